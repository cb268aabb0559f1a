"""Ends worker processes for certain, on any node: Ray's kill is a request, and a stopped process ignores it for seconds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.remote import remote_call
from raycore import tensors
from raycore.errors import RaycoreError
from raycore.transport import endpoints

_POLL_S = 0.02
_PATIENCE_S = 0.5
"""How long Ray's own kill may take before SIGKILL; an engine that was asked to stop is gone in 20 ms."""


def is_gone(pid: int) -> bool:
    """Whether no Ray worker with this pid runs on this host; a zombie holds nothing any more."""
    if _is_zombie(pid):
        return True
    try:
        # A pid may be reused: Ray titles its workers `ray::…`.
        return not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def end_process(pid: int, node_id: str, pool: str, *, limit_s: float) -> bool:
    """SIGKILL a process that Ray was told to kill and that does not go, then sweep its files; whether it is gone in the end."""
    if node_id == ray.get_runtime_context().get_node_id():
        return await end_process_here(pid, pool, limit_s=limit_s)
    if node_id not in {row["NodeID"] for row in await asyncio.to_thread(ray.nodes) if row["Alive"]}:
        return True
    there = _end_process_task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
    try:
        return await remote_call(there.remote(pid, pool, limit_s), limit_s=limit_s + _PATIENCE_S, what=f"ending process {pid}")
    except RaycoreError:
        return False  # the node died meanwhile or cannot be reached; the caller says so


async def end_process_here(pid: int, pool: str, *, limit_s: float) -> bool:
    """`end_process` for this host."""
    started_s = time.monotonic()
    is_killed = False
    # Until it is reaped, not only dead: the sweeps leave the files of a pid that is in /proc.
    while not is_gone(pid) or (_is_zombie(pid) and time.monotonic() - started_s < limit_s):
        passed_s = time.monotonic() - started_s
        if passed_s > limit_s:
            return False
        if passed_s > _PATIENCE_S and not is_killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            is_killed = True
        await asyncio.sleep(_POLL_S)
    endpoints.sweep(pool)
    tensors.sweep(pool)
    return True


@ray.remote(num_cpus=0, max_retries=0)
def _end_process_task(pid: int, pool: str, limit_s: float) -> bool:
    return asyncio.run(end_process_here(pid, pool, limit_s=limit_s))
