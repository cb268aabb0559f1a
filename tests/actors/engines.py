"""Engine factories that go wrong in ways that the echo engine does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any


def never_ready(**_: Any) -> Any:
    """Loads for ever."""
    threading.Event().wait()


def dies_while_loading(**_: Any) -> Any:
    """The process is killed while it loads, as by the kernel's OOM killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def tells_environment(**_: Any) -> Any:
    """An echo engine whose model is called after two environment variables."""
    from raycore.engines import make_engine

    return make_engine("echo", f"{os.environ.get('RAYCORE_TEST_GREETING')}/{os.environ.get('UNRELATED_SECRET')}")


def fails_on_rank_1_only(*, options: dict[str, Any], **_: Any) -> Any:
    """Raises where it is told to, and loads for ever elsewhere."""
    if options.get("fail"):
        message = "this rank fails"
        raise RuntimeError(message)
    threading.Event().wait()


def tells_when_it_loads(*, options: dict[str, Any], **_: Any) -> Any:
    """An echo engine that says in a file when it begins to load and when it has ended."""
    from raycore.engines import make_engine

    with Path(options["log"]).open("a") as log:
        print("begin", file=log, flush=True)
        time.sleep(0.3)  # long enough for others to come in between
        print("end", file=log, flush=True)
    return make_engine("echo", None)


def spreads_experts(**_: Any) -> Any:
    """An engine that says that its experts are spread over the ranks."""
    from tests.support.scripted import ScriptedEngine

    return ScriptedEngine(is_expert_parallel=True)


def holds_its_switch(*, model: str | None, options: dict[str, Any], device: str) -> Any:
    """The torch engine; while `options["hold"]` is a file it says in another that it is to switch its groups, and never does."""
    from raycore.engines import make_engine

    own = dict(options)
    rank, is_joining, hold = own.pop("rank"), own.pop("is_joining", False), Path(own.pop("hold"))
    engine: Any = make_engine("torch", model, own, device, rank=rank, size=2, is_joining=is_joining)
    switch = engine.switch

    def held() -> None:
        if hold.exists():
            hold.with_name(f"{rank} is held").touch()
            threading.Event().wait()
        switch()

    if is_joining:
        engine.switch = held
    return engine
