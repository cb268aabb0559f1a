"""A bounded profile of the step loop: of Python by default, of whatever the engine's own profiler sees where it has one."""

from __future__ import annotations

import cProfile
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Protocol

from raycore.errors import EngineStateError
from raycore.operations import ProfileArguments

_log = logging.getLogger(__name__)

MOST_STEPS = 10_000
"""A recording lies in memory until it is written; one whose caller has gone must end, too."""
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Trace(Protocol):
    """One recording."""

    suffix: str

    def start(self) -> None:
        """Begin to record on the step thread."""
        ...

    def stop(self, path: Path) -> None:
        """End, and write the trace to `path`."""
        ...


class PythonTrace:
    """cProfile of the step thread; `python -m pstats FILE` reads it."""

    suffix = ".prof"

    def __init__(self) -> None:
        self._profile = cProfile.Profile()

    def start(self) -> None:
        """Begin to record."""
        self._profile.enable()

    def stop(self, path: Path) -> None:
        """End and write."""
        self._profile.disable()
        self._profile.dump_stats(path)


class Profiler:
    """Starts after a delay in steps, stops by call or after a number of steps: `MOST_STEPS` where its caller names none."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._trace: Trace | None = None
        self._path = Path()
        self._delay_steps = 0
        self._steps_left = 0
        self._is_recording = False
        self._last = ""
        """How the last recording ended by itself, for a caller who comes to stop it."""

    def start(self, arguments: ProfileArguments, trace: Trace) -> str:
        """Prepare a recording; returns the path that it will have: PREFIX-rankR-PID, with a number where that is taken.

        EngineStateError when one runs, ValueError for numbers and prefixes that cannot be, OSError for a directory that cannot take it.
        """
        if self._trace is not None:
            msg = f"a profile runs already ({self._path}); stop it first"
            raise EngineStateError(msg, method="profile")
        if arguments.delay_steps < 0 or arguments.max_steps < 0:
            msg = "delay_steps and max_steps must not be negative"
            raise ValueError(msg)
        prefix = arguments.prefix or "raycore"
        if not _FILE_NAME.fullmatch(prefix):
            msg = "prefix is part of a file name: 1 to 128 of letters, digits, '.', '_' and '-'; use directory for the place"
            raise ValueError(msg)
        directory = Path(arguments.directory or tempfile.gettempdir())
        if not directory.is_dir():
            msg = f"no such directory on this rank's node: {directory}"
            raise FileNotFoundError(msg)
        if not os.access(directory, os.W_OK | os.X_OK):
            msg = f"this rank may not write to {directory}"
            raise PermissionError(msg)
        self._path = _free_path(directory, f"{prefix}-rank{self._rank}-{os.getpid()}", trace.suffix)
        self._delay_steps = arguments.delay_steps
        self._steps_left = arguments.max_steps or MOST_STEPS
        if self._delay_steps == 0:
            trace.start()
            self._is_recording = True
        self._trace = trace
        return str(self._path)

    def stop(self) -> str:
        """End the recording and write it; returns its path, "" where it had not begun. EngineStateError when none runs."""
        if self._trace is None:
            msg = f"no profile runs{self._last}"
            raise EngineStateError(msg, method="profile")
        trace, self._trace = self._trace, None
        if not self._is_recording:
            return ""
        self._is_recording = False
        trace.stop(self._path)
        return str(self._path)

    def on_step(self) -> None:
        """A step is over."""
        if self._trace is None:
            return
        try:
            self._count_step(self._trace)
        except (OSError, ValueError, RuntimeError) as error:  # a trace that cannot be made or written is no reason to end the loop
            self._trace, self._is_recording = None, False
            self._last = f"; the last one failed: {error}"
            _log.warning("the profile %s failed: %s", self._path, error)

    def _count_step(self, trace: Trace) -> None:
        if not self._is_recording:
            self._delay_steps -= 1
            if self._delay_steps <= 0:
                trace.start()
                self._is_recording = True
            return
        self._steps_left -= 1
        if self._steps_left <= 0:
            self._last = f"; the last one ended after its steps: {self.stop()}"


def _free_path(directory: Path, stem: str, suffix: str) -> Path:
    """A file of this name that is not there yet."""
    path, number = directory / f"{stem}{suffix}", 1
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}{suffix}"
    return path
