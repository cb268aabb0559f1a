"""Faults that tests ask an echo engine for, by name through `collective_rpc`: scheduled, never random."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable
from typing import Any, final

from raycore import errors


class ScheduledError(RuntimeError):
    """The step failed because a test asked for it."""


@final
class Faults:
    """What is to go wrong in coming steps, and the calls that arrange it."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._fails_in: int | None = None
        self._stall_s = 0.0
        self._stall_budget_s: float | None = None
        self.is_armed = False

    def methods(self) -> dict[str, Callable[..., Any]]:
        """The calls, by the names that `collective_rpc` takes."""
        return {
            "raise_error": self.raise_error,
            "sleep": self._sleep,
            "echo": self.echo,
            "fail_at_step": self.fail_at_step,
            "stall_step": self.stall_step,
        }

    def fail_at_step(self, n: int) -> None:
        """The n-th step from now raises ScheduledError; 1 is the next one."""
        self._fails_in = n
        self.is_armed = True

    def stall_step(self, seconds: float, budget_s: float | None = None) -> None:
        """The next step takes so long, and declares `budget_s` beforehand where that is given."""
        self._stall_s, self._stall_budget_s = seconds, budget_s
        self.is_armed = True

    def budget_s(self) -> float | None:
        """What the next step declares."""
        return self._stall_budget_s

    def strike(self) -> None:
        """Called in each step while `is_armed`."""
        if self._stall_s:
            seconds, self._stall_s, self._stall_budget_s = self._stall_s, 0.0, None
            self._sleep(seconds)
        if self._fails_in is not None:
            self._fails_in -= 1
            if self._fails_in <= 0:
                self._fails_in = None
                msg = "this step was scheduled to fail"
                raise ScheduledError(msg)
        self.is_armed = self._fails_in is not None

    @staticmethod
    def echo(*args: Any, **kwargs: Any) -> dict[str, Any]:
        """Answer with the arguments."""
        return {"args": list(args), "kwargs": kwargs}

    @staticmethod
    def raise_error(type_name: str, message: str) -> None:
        """Raise a builtin error or one of raycore's, by name."""
        kind: object = getattr(errors, type_name, None) or getattr(builtins, type_name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            msg = f"no exception is called {type_name!r}"
            raise ValueError(msg)  # noqa: TRY004 -- the value is a name
        raise kind(message)
