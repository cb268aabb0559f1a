"""Ray Serve's hook for autoscaling, for a pool behind a deployment: Serve scales replicas, the pool's controller scales ranks.

    autoscaling_config:
      policy:
        policy_function: "actors.serve_policy:PoolPolicy"
        policy_kwargs: {pool: default, options: {requests_per_rank: 32}, bounds: {max_ranks: 4}}

Serve calls it in its own control loop, several times a second, for all deployments in turn. So it waits for nothing: it has the pool's
controller run the policy, and now and then sees, in a thread, that it still does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.autoscaling import Autoscaling
from actors.naming import NAMESPACE, controller_name
from raycore.config import Timeouts

logger = logging.getLogger(__name__)

_CHECK_S = 5.0
"""Between two looks at the controller: one that was restarted, or a pool that was launched anew, has to be told again."""


class PoolPolicy:
    """One pool's settings, for Serve's `AutoscalingPolicy(policy_function=PoolPolicy, policy_kwargs={...})`."""

    def __init__(
        self,
        pool: str = "default",
        policy: str = "target-work",
        options: dict[str, Any] | None = None,
        bounds: dict[str, Any] | None = None,
        interval_s: float = 1.0,
        dry_run: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """As `raycore.autoscale` takes them. ConfigurationError for what does not fit."""
        self._pool = pool
        self._settings = Autoscaling.parse(
            {"policy": policy, "options": options or {}, "bounds": bounds or {}, "interval_s": interval_s, "dry_run": dry_run}
        )
        self._clock = clock
        self._due_s = 0.0
        self._check: threading.Thread | None = None
        self._trouble = ""

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """As many replicas as there are; `ctx` is Serve's AutoscalingContext."""
        if self._clock() >= self._due_s and (self._check is None or not self._check.is_alive()):
            self._due_s = self._clock() + _CHECK_S
            self._check = threading.Thread(target=self._tell, name="raycore-pool-policy", daemon=True)
            self._check.start()
        return ctx.target_num_replicas, {}

    def _tell(self) -> None:
        """Tell the controller unless it knows; whatever is wrong is logged once, and tried again later."""
        limit_s = Timeouts().control_s
        trouble = ""
        try:
            controller: Any = ray.get_actor(controller_name(self._pool), NAMESPACE)
            known = ray.get(controller.autoscaling.remote(), timeout=limit_s)
            if known != self._settings:
                ray.get(controller.autoscale.remote(self._settings), timeout=limit_s)
                logger.info("pool %s scales itself from now on", self._pool)
        except Exception as error:  # noqa: BLE001 -- an exception here would be Serve's
            trouble = f"{type(error).__name__}: {error}"
        if trouble and trouble != self._trouble:
            logger.warning("pool %s does not scale itself yet: %s", self._pool, trouble)
        self._trouble = trouble
