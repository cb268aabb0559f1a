"""Autoscaling, as pure functions: observations in, a decision with its reason out. Nothing here has a clock, a process or a memory.

observe (a window of `Observation`) -> propose (a `ScalingPolicy`) -> constrain (`Bounds` and what was done before) -> `Decision`.
"""

from __future__ import annotations

import datetime
import importlib
import math
import zoneinfo
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from raycore.engine import EngineLoad
from raycore.errors import ConfigurationError

_FULL_SHARE = 0.9
"""Of a window that must have been seen before a pool shrinks: little work since a moment ago says nothing."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at one moment; counts are sums over its serving ranks."""

    at_s: float
    """On a clock that only goes forward."""
    unix_s: float = 0.0
    """The wall clock, for schedules."""
    ranks: int
    """Serving, or about to."""
    running: int = 0
    waiting: int = 0
    prefill_tokens_waiting: int = 0
    kv_tokens_used: int = 0
    kv_tokens: int = 0
    """What the caches hold; 0: unknown."""


def observation(loads: Sequence[EngineLoad], *, at_s: float, kv_tokens: int, unix_s: float = 0.0) -> Observation:
    """A pool whose serving ranks report these loads; `kv_tokens`: what their caches hold together."""
    return Observation(
        at_s=at_s,
        unix_s=unix_s,
        ranks=len(loads),
        running=sum(load.running for load in loads),
        waiting=sum(load.waiting for load in loads),
        prefill_tokens_waiting=sum(load.prefill_tokens_waiting for load in loads),
        kv_tokens_used=sum(load.kv_tokens_used for load in loads),
        kv_tokens=kv_tokens,
    )


def add_to_window(window: deque[Observation], seen: Observation, window_s: float) -> None:
    """Keep what is not older than `window_s`, and `seen` in any case."""
    window.append(seen)
    while window[0].at_s <= seen.at_s - window_s and len(window) > 1:
        window.popleft()


class Resize(msgspec.Struct, frozen=True):
    """A resize that was carried out. `seconds`: from the decision to the last rank that serves or is gone."""

    at_s: float
    """When it ended."""
    before: int
    after: int
    seconds: float


class Proposal(msgspec.Struct, frozen=True):
    """How many ranks a policy wants, and why. `is_urgent`: growth that must not wait for a cool-down."""

    ranks: int
    reason: str
    is_urgent: bool = False


class Decision(msgspec.Struct, frozen=True):
    """What to do now: resize to `target`, or nothing where it is what there is."""

    ranks: int
    target: int
    reason: str

    @property
    def is_hold(self) -> bool:
        """Whether nothing is to be done."""
        return self.target == self.ranks


@runtime_checkable
class ScalingPolicy(Protocol):
    """Implementations keep nothing between calls: all that a proposal depends on is in the window."""

    @property
    def window_s(self) -> float:
        """How far back observations are wanted."""
        ...

    def propose(self, window: Sequence[Observation]) -> Proposal:
        """How many ranks there should be. `window`: at least one observation, oldest first, the last one being now."""
        ...


class TargetWork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keep each rank at so much work, of the kind of which there is most.

    The demand, in ranks, is averaged over `grow_window_s`; more than `tolerance` above what there is, and the pool grows to it. When the
    mean of the last `panic_window_s` is `panic_ratio` times what there is, it grows to the peak at once. It shrinks to what the highest
    mean of `panic_window_s` in the whole of `shrink_window_s` needs, with `tolerance` to spare: so a load that stays as uneven as it is
    turns the pool's size around at most once in that time, and constant work settles after one resize.
    """

    requests_per_rank: float = 32.0
    """Running and waiting."""
    kv_share: float = 0.8
    """Of the KV cache; ignored where its size is unknown."""
    prefill_tokens_per_rank: float | None = None
    """Prompt tokens that wait; None: not looked at."""
    tolerance: float = 0.15
    grow_window_s: float = 30.0
    shrink_window_s: float = 600.0
    panic_window_s: float = 6.0
    panic_ratio: float = 2.0

    def __post_init__(self) -> None:
        for name in ("requests_per_rank", "kv_share", "grow_window_s", "shrink_window_s", "panic_window_s", "prefill_tokens_per_rank"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"target-work: {name} must be above 0, not {value!r}")
        if not 0 <= self.tolerance < 1:
            raise ConfigurationError(f"target-work: tolerance must be from 0 to below 1, not {self.tolerance!r}")
        if not self.panic_ratio > 1:
            raise ConfigurationError(f"target-work: panic_ratio must be above 1, not {self.panic_ratio!r}")
        if not self.panic_window_s <= self.grow_window_s <= self.shrink_window_s:
            raise ConfigurationError("target-work: panic_window_s, grow_window_s and shrink_window_s must not be each longer than the next")

    @property
    def window_s(self) -> float:
        """The longest of the windows."""
        return self.shrink_window_s

    def demand(self, seen: Observation) -> float:
        """How many ranks its work would keep at their target."""
        wanted = (seen.running + seen.waiting) / self.requests_per_rank
        if seen.kv_tokens and seen.ranks:
            wanted = max(wanted, seen.ranks * seen.kv_tokens_used / (self.kv_share * seen.kv_tokens))
        if self.prefill_tokens_per_rank is not None:
            wanted = max(wanted, seen.prefill_tokens_waiting / self.prefill_tokens_per_rank)
        return wanted

    def propose(self, window: Sequence[Observation]) -> Proposal:
        """See the class."""
        now = window[-1]
        recent = [seen for seen in window if seen.at_s > now.at_s - self.panic_window_s]
        panic = _mean([self.demand(seen) for seen in recent])
        if panic >= self.panic_ratio * now.ranks:
            peak = math.ceil(max(self.demand(seen) for seen in recent))
            return Proposal(peak, f"work for {panic:.1f} ranks in the last {self.panic_window_s:g} s", is_urgent=True)
        steady = _mean([self.demand(seen) for seen in window if seen.at_s > now.at_s - self.grow_window_s])
        if steady > now.ranks * (1 + self.tolerance):
            return Proposal(math.ceil(steady), f"work for {steady:.1f} ranks over {self.grow_window_s:g} s")
        if window[0].at_s > now.at_s - self.shrink_window_s * _FULL_SHARE:
            return Proposal(now.ranks, f"work for {steady:.1f} ranks, not seen for long enough to shrink")
        peak = self._highest(window)
        text = f"at most work for {peak:.1f} ranks in {self.shrink_window_s:g} s"
        if peak < (now.ranks - 1) * (1 - self.tolerance):
            return Proposal(max(1, math.ceil(peak / (1 - self.tolerance))), text)
        return Proposal(now.ranks, text)

    def _highest(self, window: Sequence[Observation]) -> float:
        """The highest mean of `panic_window_s`."""
        demands = [self.demand(seen) for seen in window]
        highest = total = 0.0
        begin = 0
        for end, seen in enumerate(window):
            total += demands[end]
            while window[begin].at_s <= seen.at_s - self.panic_window_s:
                total -= demands[begin]
                begin += 1
            highest = max(highest, total / (end + 1 - begin))
        return highest


class Span(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the week. `begin`, `until`: "HH:MM"; until may be the next day's. `days`: 0 is Monday, of the day on which it begins."""

    begin: str
    until: str
    ranks: int
    days: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """So many ranks at these times, the most where spans overlap, and `otherwise` at all others."""

    spans: tuple[Span, ...]
    otherwise: int = 1
    timezone: str = "UTC"
    window_s: float = 0.0

    def __post_init__(self) -> None:
        if self.otherwise < 1 or any(span.ranks < 1 for span in self.spans):
            raise ConfigurationError("schedule: a pool keeps at least one rank")
        for span in self.spans:
            _minutes(span.begin), _minutes(span.until)
            if not span.days or any(day not in range(7) for day in span.days):
                raise ConfigurationError(f"schedule: days are numbers from 0 (Monday) to 6, not {span.days!r}")
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ConfigurationError(f"schedule: unknown timezone {self.timezone!r}") from error

    def propose(self, window: Sequence[Observation]) -> Proposal:
        """What the schedule says of now."""
        local = datetime.datetime.fromtimestamp(window[-1].unix_s, zoneinfo.ZoneInfo(self.timezone))
        minute = local.hour * 60 + local.minute
        running = [span for span in self.spans if _covers(span, local.weekday(), minute)]
        if not running:
            return Proposal(self.otherwise, "no span of the schedule")
        span = max(running, key=lambda each: each.ranks)
        return Proposal(span.ranks, f"scheduled from {span.begin} to {span.until}")


class Highest:
    """The proposal of whichever policy wants most: a schedule below, work above."""

    def __init__(self, policies: Sequence[ScalingPolicy]) -> None:
        if not policies:
            raise ConfigurationError("highest: there is no policy to choose from")
        self._policies = tuple(policies)

    @property
    def window_s(self) -> float:
        """The longest."""
        return max(policy.window_s for policy in self._policies)

    def propose(self, window: Sequence[Observation]) -> Proposal:
        """The highest; the first among equals, an urgent one before others."""
        proposals = [policy.propose(window) for policy in self._policies]
        return max(proposals, key=lambda proposal: (proposal.ranks, proposal.is_urgent))


class Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What no policy may go beyond."""

    min_ranks: int = 1
    max_ranks: int = 8
    growth: float = 2.0
    """A resize grows at most so many times; by one rank at least."""
    cool_down_s: float = 60.0
    """After a resize the pool does not shrink for so long, nor grow again after a shrink unless it is urgent."""
    cool_down_factor: float = 5.0
    """Or for so many times what growing took last, if that is longer."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ranks <= self.max_ranks:
            raise ConfigurationError(f"min_ranks and max_ranks must be 1 <= min <= max, not {self.min_ranks} and {self.max_ranks}")
        if self.growth <= 1 or self.cool_down_s < 0 or self.cool_down_factor < 0:
            raise ConfigurationError("growth must be above 1, and a cool-down not below 0")


def decide(proposal: Proposal, bounds: Bounds, now: Observation, done: Sequence[Resize]) -> Decision:
    """Constrain a proposal. `done`: resizes so far, oldest first."""
    target = min(max(proposal.ranks, bounds.min_ranks), bounds.max_ranks)
    reason = proposal.reason
    if target != proposal.ranks:
        reason += f"; {proposal.ranks} is out of bounds"
    if target > now.ranks:
        step = max(now.ranks + 1, math.floor(now.ranks * bounds.growth))
        if target > step and now.ranks >= bounds.min_ranks:
            target, reason = step, f"{reason}; at most {bounds.growth:g} times at once"
    left_s = _cooling_s(bounds, now, done)
    is_forced = not bounds.min_ranks <= now.ranks <= bounds.max_ranks
    if left_s > 0 and not is_forced and target != now.ranks:
        if target < now.ranks:
            return Decision(now.ranks, now.ranks, f"{reason}; shrinks in {left_s:.0f} s at the earliest")
        if done[-1].after < done[-1].before and not proposal.is_urgent:
            return Decision(now.ranks, now.ranks, f"{reason}; grows again in {left_s:.0f} s at the earliest")
    return Decision(now.ranks, target, reason)


def _cooling_s(bounds: Bounds, now: Observation, done: Sequence[Resize]) -> float:
    if not done:
        return 0.0
    grown = [resize.seconds for resize in done if resize.after > resize.before]
    cool_down_s = max(bounds.cool_down_s, bounds.cool_down_factor * grown[-1] if grown else 0.0)
    return done[-1].at_s + cool_down_s - now.at_s


def make_policy(name: str, options: Mapping[str, Any] | None = None) -> ScalingPolicy:
    """A policy by name: target-work, schedule, highest (`policies=[{"name": ..., "options": {...}}]`), or "module:Class" of one's own.

    ConfigurationError for an unknown name or options that do not fit.
    """
    given = dict(options or {})
    try:
        if name == "target-work":
            return msgspec.convert(given, TargetWork)
        if name == "schedule":
            return msgspec.convert(given, Schedule)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{name}: {error}") from error
    if name == "highest":
        rows = given.pop("policies", None)
        if given or not isinstance(rows, (list, tuple)) or not all(isinstance(row, Mapping) and "name" in row for row in rows):
            raise ConfigurationError('highest takes policies=[{"name": ..., "options": {...}}, ...]')
        return Highest([make_policy(row["name"], row.get("options")) for row in rows])
    if ":" not in name:
        raise ConfigurationError(f"unknown scaling policy {name!r}; there are target-work, schedule, highest, and module:Class")
    return _imported(name, given)


def _imported(name: str, options: dict[str, Any]) -> ScalingPolicy:
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)(**options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"scaling policy {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(policy, ScalingPolicy):
        raise ConfigurationError(f"{name!r} is no scaling policy: it needs window_s and propose()")
    return policy


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _minutes(text: str) -> int:
    try:
        time = datetime.time.fromisoformat(text)
    except ValueError as error:
        raise ConfigurationError(f"schedule: a time of day is HH:MM, not {text!r}") from error
    return time.hour * 60 + time.minute


def _covers(span: Span, weekday: int, minute: int) -> bool:
    begin, until = _minutes(span.begin), _minutes(span.until)
    if begin < until:
        return weekday in span.days and begin <= minute < until
    return (weekday in span.days and minute >= begin) or ((weekday - 1) % 7 in span.days and minute < until)
