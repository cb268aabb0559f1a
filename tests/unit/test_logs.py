"""Log lines of an engine process."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from raycore.config import log_level
from raycore.logs import LOGGERS, PrefixedStream, log_as, log_everything_as, rank_name


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


def test_every_line_starts_with_pool_and_rank() -> None:
    stream = io.StringIO()
    log_as("chat.v1", rank_name(3), "INFO", stream)
    log_as("chat.v1", rank_name(3), "INFO", stream)
    logging.getLogger("raycore.core.host").info("up: %s", "torch")
    logging.getLogger("actors.fleet").warning("two\nlines")
    logging.getLogger("raycore").debug("too much")
    logging.getLogger("elsewhere").warning("not ours")
    assert stream.getvalue() == (
        "chat.v1 rank 3 | INFO raycore.core.host: up: torch\nchat.v1 rank 3 | WARNING actors.fleet: two\nchat.v1 rank 3 | lines\n"
    )


def test_in_a_rank_s_own_process_nothing_is_without_pool_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    log_everything_as("chat", "standby 1a2b", "WARNING")
    log_everything_as("chat", rank_name(0), "WARNING")
    logging.getLogger("raycore").warning("ours")
    theirs = logging.getLogger("somebody.s.library")
    theirs.propagate, theirs.handlers[:] = False, [logging.StreamHandler()]
    theirs.warning("slow\ntokenizer")
    for part in ("printed", " ", "in parts", "\n", ":actor_name:rank 0 chat", "\n"):  # as `print` does
        sys.stderr.write(part)
    threading.__excepthook__(threading.ExceptHookArgs((KeyError, KeyError("missing"), None, threading.current_thread())))
    assert isinstance(sys.stderr, PrefixedStream)
    assert not sys.stderr.isatty()
    lines = raw.getvalue().splitlines()
    for part in ("WARNING raycore: ours", "slow", "tokenizer", "printed in parts", "KeyError: 'missing'"):
        assert sum(part in line for line in lines) >= 1, part
    assert [line for line in lines if not line.startswith("chat rank 0 | ")] == [":actor_name:rank 0 chat"], "which is for Ray"


@pytest.mark.parametrize(
    ("given", "level"), [(None, "WARNING"), ("debug", "DEBUG"), ("INFO", "INFO"), ("loud", "WARNING"), ("", "WARNING")]
)
def test_the_level_is_the_environments_where_it_means_something(monkeypatch: pytest.MonkeyPatch, given: str | None, level: str) -> None:
    monkeypatch.delenv("RAYCORE_LOG_LEVEL", raising=False)
    if given is not None:
        monkeypatch.setenv("RAYCORE_LOG_LEVEL", given)
    assert log_level() == level


def test_the_driver_s_level_counts_where_the_process_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCORE_LOG_LEVEL", raising=False)
    assert log_level({"RAYCORE_LOG_LEVEL": "info"}) == "INFO"
    monkeypatch.setenv("RAYCORE_LOG_LEVEL", "debug")
    assert log_level({"RAYCORE_LOG_LEVEL": "info"}) == "DEBUG"
