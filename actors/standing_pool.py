"""A pool that stands by itself: detached, launched by whoever needs it first, found by its controller's name by everybody else."""

from __future__ import annotations

import logging
import time

from actors.control_plane import find_actor
from actors.driver import PoolDriver
from actors.naming import controller_name
from actors.remote import remote_call
from raycore.config import PoolConfig
from raycore.errors import ConfigurationError, DeadlineError, PoolError, PoolExistsError, PoolNotFoundError

logger = logging.getLogger(__name__)


def detached(config: PoolConfig) -> PoolConfig:
    """The same pool, detached. ConfigurationError where another lifetime was asked for by name."""
    if "lifetime" in config.model_fields_set and config.lifetime != "detached":
        msg = f"a pool behind Serve is detached, so that replicas come and go without it; lifetime is {config.lifetime!r}"
        raise ConfigurationError(msg)
    return config.model_copy(update={"lifetime": "detached"})


async def ensure_pool(config: PoolConfig) -> bool:
    """Have this pool run: launch it where there is none, else wait until it is up. Whether this call launched it.

    Several callers may do so at once: Ray lets one of them have the controller's name, and the others wait for what that one makes. A
    launch that fails raises in the caller that tried it; those that waited try in their turn, and raise what they meet themselves.
    """
    timeouts = config.timeouts
    limit_s = 2 * timeouts.reserve_s + timeouts.engine_start_s + 2 * timeouts.control_s
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        try:
            controller = await find_actor(controller_name(config.pool))
        except PoolNotFoundError:
            try:
                await _launch(config)
            except PoolExistsError:
                continue
            return True
        try:
            await remote_call(controller.access.remote(), limit_s=until_s - time.monotonic(), what=f"pool {config.pool!r}: access")
        except DeadlineError:
            raise
        except PoolError as error:
            logger.warning("pool %s did not come up for whoever launched it: %s", config.pool, error)
            continue
        return False
    raise DeadlineError(f"pool {config.pool!r} did not come up within {limit_s:g} s")


async def _launch(config: PoolConfig) -> None:
    driver = PoolDriver(detached(config))
    await driver.open()
    await driver.close()  # of a detached pool: only lets it go
