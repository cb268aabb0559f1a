"""Ray in this process: connects where there is a cluster, starts a local one where there is none, and ends only what it started."""

from __future__ import annotations

import logging
import math
import os
import threading

import ray

from raycore.config import PoolConfig
from raycore.errors import PoolNotFoundError

logger = logging.getLogger(__name__)


class _LocalRay:
    """Whether raycore connected this process to Ray, and how many users that has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_ours = False
        self._users = 0

    def acquire(self, config: PoolConfig | None) -> bool:
        with self._lock:
            if not ray.is_initialized():
                self._is_ours = _initialise(config)
                self._users = 0
            self._users += 1
            return self._is_ours

    def release(self) -> None:
        with self._lock:
            self._users = max(0, self._users - 1)
            if self._is_ours and self._users == 0 and ray.is_initialized():
                ray.shutdown()
                self._is_ours = False


_ray = _LocalRay()


def ensure_ray(config: PoolConfig | None = None) -> bool:
    """Have Ray in this process; whether raycore connected it. Without a configuration only a cluster that runs will do."""
    return _ray.acquire(config)


def release_ray() -> None:
    """One user less; with the last one this process leaves a Ray that raycore connected, which ends a local one."""
    _ray.release()


def _initialise(config: PoolConfig | None) -> bool:
    if os.environ.get("RAY_ADDRESS"):
        # A submitted job, or a cluster that the user named: bare, since resources given here would be refused.
        ray.init(logging_level=logging.WARNING)
        return False
    if config is None:
        return _attach()
    engines = max(config.max_data_parallel_size, config.data_parallel_size)
    num_cpus = max(os.cpu_count() or 1, math.ceil(engines * config.num_cpus_per_engine))
    logger.info("no Ray cluster given (RAY_ADDRESS): starting a local one with %d logical CPUs on %s", num_cpus, os.cpu_count())
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level=logging.ERROR,
    )
    return True


def _attach() -> bool:
    """Somebody looks for a pool that runs: a new cluster cannot have it."""
    try:
        ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        msg = f"there is no Ray cluster to look in (RAY_ADDRESS is not set): {error}"
        raise PoolNotFoundError(msg) from error
    return True
