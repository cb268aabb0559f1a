"""Sleep: which parts of an engine are away, and in which order they go and come back.

awake ── sleep(1 or 2) ──▶ asleep (weights and KV cache away) ── wake_up(one tag) ──▶ asleep (the other away) ── wake_up ──▶ awake
awake ── release_kv_cache ──▶ awake, KV cache away ── next request, or wake_up ──▶ awake
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence

import torch

from raycore.engines.torch.weights import Weights
from raycore.errors import EngineStateError, InvalidArgumentsError

WEIGHTS, KV_CACHE = "weights", "kv_cache"
TO_HOST, DROPPED = 1, 2


class Sleep:
    """The parts of one engine; `drop_cache` frees the KV cache and what refers to it, `restore_cache` allocates it again.

    `on_ready` is called when everything is back after something was away.
    """

    def __init__(
        self, weights: Weights, drop_cache: Callable[[], None], restore_cache: Callable[[], None], on_ready: Callable[[], None]
    ) -> None:
        self._weights = weights
        self._drop_cache = drop_cache
        self._restore_cache = restore_cache
        self._on_ready = on_ready
        self._level = 0
        self._away: set[str] = set()

    @property
    def is_sleeping(self) -> bool:
        """Whether the engine may not step: not all of it is back since `sleep`."""
        return self._level > 0

    def sleep(self, level: int) -> None:
        """Send the parts away. EngineStateError when they are; what goes wrong is undone."""
        if self._level:
            raise EngineStateError(f"the engine sleeps already, at level {self._level}: call wake_up before another sleep")
        if level not in (TO_HOST, DROPPED):
            raise InvalidArgumentsError(f"level must be {TO_HOST} (weights to host memory) or {DROPPED} (dropped), not {level!r}")
        if level == TO_HOST:
            self._weights.to_host()  # may run out of memory, so it comes before anything is given up
        else:
            self._weights.drop()
        if KV_CACHE not in self._away:
            self._drop_cache()
        self._level, self._away = level, {WEIGHTS, KV_CACHE}
        give_back_memory()

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Bring these parts back, None being all; whether the engine is awake then. What goes wrong leaves that part away.

        EngineStateError when one of them is back already.
        """
        wanted = set(self._away if tags is None else tags)
        unknown = wanted - {WEIGHTS, KV_CACHE}
        if unknown or (tags is not None and not wanted):
            raise InvalidArgumentsError(f"tags are None, or some of {WEIGHTS!r} and {KV_CACHE!r}, not {list(tags or ())!r}")
        if not self._away:
            raise EngineStateError("the engine is awake: there is nothing to wake up")
        if wanted - self._away:
            back, away = ", ".join(sorted(wanted - self._away)), ", ".join(sorted(self._away))
            raise EngineStateError(f"back already: {back}; still away: {away}")
        # Weights first: a reload needs room for a while, which the cache would take.
        for tag, restore in ((WEIGHTS, self._weights.restore), (KV_CACHE, self._restore_cache)):
            if tag in wanted:
                restore()
                self._away.discard(tag)
        give_back_memory()
        if not self._away:
            self._level = 0
            self._on_ready()
        return not self._level

    def release_kv_cache(self, *, has_work: bool) -> None:
        """Free the cache of an idle engine that stays awake. EngineStateError while requests need it."""
        if KV_CACHE in self._away:
            raise EngineStateError("the KV cache is released already" + (": the engine sleeps" if self._level else ""))
        if has_work:
            raise EngineStateError("requests need the KV cache: let them end or abort them first, or use sleep, which recomputes them")
        self._drop_cache()
        self._away = {KV_CACHE}
        give_back_memory()

    def ensure_cache(self) -> None:
        """Have a released cache back before it is needed."""
        if self._away == {KV_CACHE} and not self._level:
            self._restore_cache()
            self._away.clear()
            self._on_ready()

    def check_awake(self, what: str) -> None:
        """EngineStateError that names `what` while the engine sleeps."""
        if self._level:
            raise EngineStateError(f"{what} needs an engine that is awake: call wake_up first")


def give_back_memory() -> None:
    """What was freed goes back to the driver of the GPU and to the operating system, so that others can have it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        # The page-locked copies of weights that are back; torch would keep them. The public name is newer than torch 2.11.
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)  # noqa: SLF001
        if empty is not None:
            empty()
    # Freed blocks below glibc's mmap threshold (32 MiB at most) stay in its heap until it is told.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
