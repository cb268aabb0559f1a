"""The files of pools' events: where they are, how one is written without ever growing without end, and how one is read."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import final

from raycore.config import POOL_NAME, event_log_wanted, state_directory
from raycore.errors import ConfigurationError
from raycore.events import Event, decode_lines, encode

logger = logging.getLogger(__name__)

OFF, AUTO = "off", "auto"
MOST_BYTES = 8 << 20
"""A file that gets longer becomes `POOL.jsonl.1`, in place of the one before it: a pool's events take twice this at most."""
FILES_KEPT = 128
"""Pools whose files a directory keeps, the latest: names of short-lived pools would fill it up."""
_SUFFIX, _OLDER = ".jsonl", ".jsonl.1"


def event_directory(setting: str) -> Path | None:
    """Where `PoolConfig.event_log` puts files: nowhere, the user's state directory, or the directory that it names."""
    if setting == OFF:
        return None
    if setting != AUTO:
        return Path(setting).expanduser()
    return state_directory() / "events"


@final
class EventLog:
    """Appends to one pool's file. What the disk refuses is dropped and said once: no pool ends because nobody can write about it."""

    def __init__(self, directory: Path, pool: str, most_bytes: int = MOST_BYTES) -> None:
        self._path = directory / f"{pool}{_SUFFIX}"
        self._most_bytes = most_bytes
        self._file = -1
        self._size = 0
        self._has_failed = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _prune(directory, self._path)
            self._open()
        except OSError as error:
            self._fail(error)

    def append(self, event: Event) -> None:
        """Write one line."""
        if self._file < 0:
            return
        line = encode(event)
        try:
            if self._size + len(line) > self._most_bytes:
                os.close(self._file)
                self._file = -1
                self._path.replace(self._path.with_suffix(_OLDER))
                self._open()
            self._size += os.write(self._file, line)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def _fail(self, error: OSError) -> None:
        self.close()
        if not self._has_failed:
            self._has_failed = True
            logger.warning("no event log in %s: %s", self._path, error)


def _prune(directory: Path, ours: Path) -> None:
    """Remove the oldest files above the number that is kept; ours counts and stays."""
    files = [path for path in directory.glob(f"*{_SUFFIX}") if path != ours]
    with contextlib.suppress(OSError):  # another controller may prune too
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[FILES_KEPT - 1 :]:
            path.unlink()
            path.with_suffix(_OLDER).unlink(missing_ok=True)


def find_log(name: str | None) -> Path:
    """The file of a pool, by its name or path; None: the one that was written to last. ConfigurationError where there is none."""
    if name is not None and (Path(name).is_file() or "/" in name or name.endswith(_SUFFIX)):
        path = Path(name)
        if not path.is_file():
            raise ConfigurationError(f"there is no file {name}")
        return path
    directory = event_directory(event_log_wanted())
    if directory is None:
        raise ConfigurationError("RAYCORE_EVENT_LOG is off; name a file")
    if name is None:
        files = sorted(directory.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
        if not files:
            raise ConfigurationError(f"there is no event log in {directory}")
        return files[-1]
    path = directory / f"{name}{_SUFFIX}"
    if not POOL_NAME.fullmatch(name) or not path.is_file():
        raise ConfigurationError(f"there is no event log of a pool {name!r} in {directory} (its controller's node has it)")
    return path


def read_log(path: Path) -> Iterator[Event]:
    """Every event of a pool, the oldest that is kept first."""
    for each in (path.with_suffix(_OLDER), path) if path.name.endswith(_SUFFIX) else (path,):
        if each.is_file():
            with each.open("rb") as lines:
                yield from decode_lines(lines)


def last_life(events: Iterator[Event]) -> list[Event]:
    """The events of the pool that was heard of last."""
    every = list(events)
    return [event for event in every if event.life == every[-1].life]
