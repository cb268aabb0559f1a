"""A driver of its own: opens a pool, says so, and waits to be killed. Arguments: pool, lifetime."""

from __future__ import annotations

import asyncio
import sys

from actors.driver import PoolDriver
from raycore.config import parse_config


async def main(pool: str, lifetime: str) -> None:
    driver = PoolDriver(parse_config({"pool": pool, "engine": "echo", "lifetime": lifetime, "data_parallel_size": 2}))
    await driver.open()
    sys.stdout.write("pool is open\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
