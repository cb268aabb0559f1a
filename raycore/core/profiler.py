"""A bounded profile of the step loop: of Python by default, of whatever the engine's own profiler sees where it has one."""

from __future__ import annotations

import cProfile
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Protocol

from raycore.operations import ProfileArguments

_log = logging.getLogger(__name__)

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
    """Starts after a delay in steps, stops by call or after a number of steps."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._trace: Trace | None = None
        self._path = Path()
        self._delay_steps = 0
        self._steps_left: int | None = None
        self._is_recording = False

    def start(self, arguments: ProfileArguments, trace: Trace) -> str:
        """Prepare a recording; returns the path that it will have. RuntimeError when one runs."""
        if self._trace is not None:
            msg = "a profile runs already; stop it first"
            raise RuntimeError(msg)
        if arguments.delay_steps < 0 or arguments.max_steps < 0:
            msg = "delay_steps and max_steps must not be negative"
            raise ValueError(msg)
        directory = Path(arguments.directory or tempfile.gettempdir())
        if not directory.is_dir():
            msg = f"no such directory on this rank's node: {directory}"
            raise FileNotFoundError(msg)
        prefix = arguments.prefix or "raycore"
        if not _FILE_NAME.fullmatch(prefix):
            msg = "prefix is part of a file name: 1 to 128 of letters, digits, '.', '_' and '-'; use directory for the place"
            raise ValueError(msg)
        self._path = directory / f"{prefix}-rank{self._rank}-{os.getpid()}{trace.suffix}"
        self._trace = trace
        self._delay_steps = arguments.delay_steps
        self._steps_left = arguments.max_steps or None
        if self._delay_steps == 0:
            self._record()
        return str(self._path)

    def stop(self) -> str:
        """End the recording and write it; returns its path. RuntimeError when none runs."""
        if self._trace is None:
            msg = "no profile runs"
            raise RuntimeError(msg)
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
        if not self._is_recording:
            self._delay_steps -= 1
            if self._delay_steps <= 0:
                self._record()
        elif self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left <= 0:
                try:
                    self.stop()
                except (OSError, ValueError, RuntimeError) as error:  # a trace that cannot be written is no reason to end the loop
                    _log.warning("the profile could not be written: %s", error)

    def _record(self) -> None:
        if self._trace is not None:
            self._is_recording = True
            self._trace.start()
