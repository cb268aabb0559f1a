"""The controller's autoscaling loop: observes the pool, asks a policy, and scales. Decisions are `elastic/policies.py`'s."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from elastic.policies import Bounds, Decision, Observation, Resize, ScalingPolicy, add_to_window, decide, make_policy
from raycore.client.control import ScalingReport
from raycore.errors import ConfigurationError, RaycoreError, ScalingBusyError

logger = logging.getLogger(__name__)

_KEPT_DECISIONS = 64
_KEPT_RESIZES = 16
_KEPT_OBSERVATIONS = 100_000


class Autoscaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a pool is told to do by itself."""

    policy: str = "target-work"
    options: dict[str, Any] = {}
    bounds: Bounds = Bounds()
    interval_s: float = 1.0
    """Between two looks."""
    dry_run: bool = True
    """Decide, log and show, and scale nothing."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Autoscaling:
        """ConfigurationError for what does not fit, the policy's own options included."""
        try:
            settings = msgspec.convert(dict(values), cls)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"autoscaling: {error}") from error
        if not settings.interval_s > 0:
            raise ConfigurationError(f"autoscaling: interval_s must be above 0, not {settings.interval_s!r}")
        make_policy(settings.policy, settings.options)
        return settings


class Autoscaler:
    """Off until `configure`; runs on the controller's event loop, and never waits for a resize that it began."""

    def __init__(
        self,
        observe: Callable[[], Observation | str],
        scale: Callable[[int], Awaitable[ScalingReport]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`observe`: the pool now, or why it cannot be told, in which case nothing is decided."""
        self._observe = observe
        self._scale = scale
        self._clock = clock
        self._settings: Autoscaling | None = None
        self._policy: ScalingPolicy | None = None
        self._window: deque[Observation] = deque(maxlen=_KEPT_OBSERVATIONS)
        self._done: deque[Resize] = deque(maxlen=_KEPT_RESIZES)
        self._decisions: deque[dict[str, Any]] = deque(maxlen=_KEPT_DECISIONS)
        self._loop: asyncio.Task[None] | None = None
        self._resizing: asyncio.Task[None] | None = None
        self._blocked_until_s = 0.0
        self._last = ""

    @property
    def settings(self) -> Autoscaling | None:
        """What it was told last."""
        return self._settings

    def configure(self, settings: Autoscaling | None) -> None:
        """Begin, or go on otherwise; None: stop. A resize that runs is finished."""
        if settings is None:
            self._settings = self._policy = None
            self._stop()
            return
        self._policy = make_policy(settings.policy, settings.options)
        self._settings = settings
        self._last = ""
        if self._loop is None:
            self._loop = asyncio.get_running_loop().create_task(self._run())

    def close(self) -> None:
        """Stop. Idempotent."""
        self._stop()
        if self._resizing is not None:
            self._resizing.cancel()

    def status(self) -> dict[str, Any]:
        """For people: what it was told, what it thinks now, and what it decided to change, newest first."""
        settings = self._settings
        return {
            "settings": None if settings is None else msgspec.to_builtins(settings),
            "now": self._last,
            "is_resizing": self._resizing is not None,
            "decisions": list(reversed(self._decisions)),
        }

    def look(self) -> Decision | None:
        """Observe and decide once, and begin what was decided; None where nothing could be decided."""
        settings, policy = self._settings, self._policy
        if settings is None or policy is None:
            return None
        seen = self._observe()
        if isinstance(seen, str):
            self._last = f"holds: {seen}"
            return None
        add_to_window(self._window, seen, policy.window_s)
        if self._resizing is not None:
            self._last = "holds: a resize is under way"
            return None
        decision = decide(policy.propose(tuple(self._window)), settings.bounds, seen, tuple(self._done))
        self._last = f"{'holds' if decision.is_hold else f'{decision.ranks} → {decision.target}'}: {decision.reason}"
        if not decision.is_hold:
            self._act(decision, is_dry=settings.dry_run)
        return decision

    def _act(self, decision: Decision, *, is_dry: bool) -> None:
        if self._clock() < self._blocked_until_s:
            self._last += "; waits after a resize that failed"
            return
        newest = self._decisions[-1] if self._decisions else None
        said = {"ranks": decision.ranks, "target": decision.target, "reason": decision.reason, "dry_run": is_dry, "unix_s": time.time()}
        is_news = newest is None or (newest["ranks"], newest["target"]) != (decision.ranks, decision.target) or not is_dry
        if is_news:
            self._decisions.append(said)
            logger.warning(
                "autoscaling%s: %d to %d ranks: %s", " (dry run)" if is_dry else "", decision.ranks, decision.target, decision.reason
            )
        if not is_dry:
            said["outcome"] = "under way"
            self._resizing = asyncio.get_running_loop().create_task(self._resize(decision, said))

    async def _resize(self, decision: Decision, said: dict[str, Any]) -> None:
        begin_s = self._clock()
        try:
            report = await self._scale(decision.target)
        except ScalingBusyError as error:
            said["outcome"] = str(error)
        except RaycoreError as error:
            said["outcome"] = f"{type(error).__name__}: {error}"
            settings = self._settings
            self._blocked_until_s = self._clock() + (settings.bounds.cool_down_s if settings is not None else 0.0)
            logger.error("autoscaling: %d to %d ranks failed: %s", decision.ranks, decision.target, error)  # noqa: TRY400 -- typed, and expected
        else:
            now_s = self._clock()
            said["outcome"] = "done"
            self._done.append(Resize(now_s, decision.ranks, len(report.ranks), now_s - begin_s))
        finally:
            self._resizing = None

    async def _run(self) -> None:
        while self._settings is not None:
            try:
                self.look()
            except Exception:
                # a policy from outside must not end the loop, nor the controller
                logger.exception("autoscaling: the policy failed")
                self._last = "holds: the policy failed"
            await asyncio.sleep(self._settings.interval_s)

    def _stop(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
            self._loop = None
        self._window.clear()
