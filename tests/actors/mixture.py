"""An expert-parallel pool of a tiny mixture that says what a dense model says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from actors.groups import pool_groups
from actors.naming import Role, named_actors
from raycore.client.client import EngineCoreClient
from tests.actors.pools import PoolMaker
from tests.torch_engine.tiny import GREEDY, driver_of, prompts, save_mixture

START_S = 120.0
"""A process with torch, on a machine that does much else."""


class Mixture:
    """Ranks that share the experts of a tiny mixture, whose text is the dense model's; its checkpoint is gone once the ranks have it."""

    def __init__(self, pools: PoolMaker, folder: Path, pool: str) -> None:
        self._pools, self._folder, self._pool = pools, folder, pool
        save_mixture(folder)
        plain = driver_of(folder / "dense")
        self.prompts = prompts(4)
        self.texts = [plain.one(prompt, GREEDY).tokens for prompt in self.prompts]

    async def open(self, **changes: Any) -> None:
        await self._pools.open(
            self._pool,
            engine="torch",
            model=str(self._folder / "moe"),
            engine_options={"kv_tokens": 1024, "threads": 1},
            timeouts={"drain_s": 0.2},
            health={"hang_after_s": 10.0, "first_beat_s": 60.0},
            **{"num_cpus_per_engine": 0.5, **changes},
        )
        (self._folder / "moe").rename(self._folder / "elsewhere")

    async def check(self, client: EngineCoreClient) -> None:
        """Every rank says what the dense model says, and all experts are there."""
        ranks = client.ranks()
        asked = [(rank, n) for rank in ranks for n in range(len(self.prompts))]
        streams = [client.generate(self.prompts[n], GREEDY, data_parallel_rank=rank).collect() for rank, n in asked]
        assert [output.token_ids for output in await asyncio.gather(*streams)] == [self.texts[n] for _, n in asked]
        sums = await client.call_all("compute_weight_checksums")
        held = [{name.split(".experts.")[1][0] for name in sums[rank] if ".experts." in name} for rank in ranks]
        assert all(held)
        assert set().union(*held) == {"0", "1", "2", "3"}

    async def is_gone(self) -> bool:
        """But for the sentinel, which is the driver's."""
        left = {name.role for name in await asyncio.to_thread(named_actors, self._pool)}
        return left <= {Role.SENTINEL} and not await asyncio.to_thread(pool_groups, self._pool)
