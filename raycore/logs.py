"""Log lines of a process that belongs to a pool: each starts with the pool and who it is, since those of a fleet end up in one place."""

from __future__ import annotations

import io
import logging
import sys
from typing import TextIO

LOGGERS = ("raycore", "actors", "elastic")


class _Prefixed(logging.Formatter):
    """Puts the same words before every line, those of a traceback too."""

    def __init__(self, prefix: str) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        """The record with the prefix on each of its lines."""
        return "\n".join(self._prefix + line for line in super().format(record).split("\n"))


def rank_name(rank: int) -> str:
    """How log lines call a rank."""
    return f"rank {rank}"


def log_as(pool: str, who: str, level: str, stream: TextIO | None = None) -> None:
    """Have raycore's own loggers of this process write to `stream` (standard error) as `who`, from `level` on. Called again: as another."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Prefixed(f"{pool} {who} | "))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level)


def log_everything_as(pool: str, who: str, level: str) -> None:
    """`log_as` in a process that is the pool's alone, and whatever else Python writes to standard error begins alike.

    That is other libraries' lines, warnings, what prints to it, and the last words of threads; not what C libraries write.
    """
    stream = sys.stderr.inner if isinstance(sys.stderr, PrefixedStream) else sys.stderr
    log_as(pool, who, level, stream)
    sys.stderr = PrefixedStream(stream, f"{pool} {who} | ")


class PrefixedStream(io.TextIOBase):
    """Puts the same words before every line on its way to another stream."""

    def __init__(self, inner: TextIO, prefix: str) -> None:
        self.inner = inner
        self._prefix = prefix
        self._is_at_begin = True

    def write(self, text: str) -> int:
        """Write through; text of one call stays together."""
        parts: list[str] = []
        for line in text.splitlines(keepends=True):
            # Ray tells its log monitor who writes by lines like ":actor_name:rank 3", which must begin so
            if self._is_at_begin and not line.startswith(":"):
                parts.append(self._prefix)
            parts.append(line)
            self._is_at_begin = line.endswith(("\n", "\r"))
        self.inner.write("".join(parts))
        return len(text)

    def flush(self) -> None:
        """Likewise."""
        self.inner.flush()

    def fileno(self) -> int:
        """The other stream's, for what writes past this."""
        return self.inner.fileno()

    def isatty(self) -> bool:
        """As the other stream is."""
        return self.inner.isatty()

    def writable(self) -> bool:
        """Yes."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The other stream's."""
        return self.inner.encoding
