"""Weights of a rank that joins: the rate at which they come from one and from two peers, beside a load from disk.

SmolLM2-135M in float32 on CPUs. A pool of one rank grows to two and to three; the rate is the joiner's own, from the first portion that it
waits for to the last. The floor is the same checkpoint loaded by transformers in this process, from a safetensors file that the system has
in its cache: what a joiner would do without peers, at its best.

    python -m bench.weight_copy --json weights.json
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from actors.control_plane import RayControlPlane
from actors.launch import launch
from bench.report import Row, arguments, median, publish
from raycore.config import Timeouts
from raycore.engines.torch import TorchEngineOptions
from raycore.engines.torch.conversion import converted
from raycore.engines.torch.loading import find_smollm2, load_checkpoint

POOL = "bench-weights"
SIZES = (2, 3)
MIB = 1 << 20


async def from_peers(model: Path, samples: dict[str, list[float]]) -> None:
    options = {"kv_tokens": 1024, "threads": 1}
    async with launch(pool=POOL, model=str(model), engine_options=options, num_cpus_per_engine=0.1) as client:
        for size in SIZES:
            report = await client.scale_elastic_ep(size)
            assert report.weight_bytes_from_disk == 0, "the copy failed: see the log"
            (operation, *_) = (await RayControlPlane(POOL, Timeouts()).status())["operations"]
            samples.setdefault(f"from {size - 1} peer{'s' if size > 2 else ''}", []).append(operation["weights"]["bytes_per_s"] / MIB)
            samples.setdefault("bytes", []).append(report.weight_bytes)


def from_disk(model: Path, samples: dict[str, list[float]], nbytes: float) -> None:
    begin_s = time.perf_counter()
    load_checkpoint(TorchEngineOptions(model=str(model), dtype="float32", device="cpu"))
    samples.setdefault("from disk", []).append(nbytes / MIB / (time.perf_counter() - begin_s))


def main() -> None:
    """Measure and publish."""
    options = arguments(__doc__ or "").parse_args()
    model = converted(find_smollm2())
    samples: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        asyncio.run(from_peers(model, samples))
        from_disk(model, samples, samples["bytes"][0])
    floor = median(samples["from disk"])
    rows = [
        Row(name, median(values), "MiB/s", floor=floor, floor_name="from disk", samples=values)
        for name, values in samples.items()
        if name != "bytes"
    ]
    publish(f"Weights of a joiner: {samples['bytes'][0] / MIB:.0f} MiB", rows, options.json)


if __name__ == "__main__":
    main()
