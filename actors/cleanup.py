"""`cleanup`: removes by name what a pool left whose controller and driver are both gone."""

from __future__ import annotations

from actors.blocking import run_blocking
from actors.local_ray import ensure_ray, release_ray
from actors.pool_end import CleanupReport, clean_up
from raycore.config import Timeouts


def cleanup(pool: str) -> CleanupReport:
    """End a pool by force: its actors, placement groups, processes, socket directories, shared-memory files. Idempotent."""
    ensure_ray()
    try:
        return run_blocking(clean_up(pool, limit_s=Timeouts().stop_s))
    finally:
        release_ray()
