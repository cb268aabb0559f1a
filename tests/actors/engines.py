"""Engine factories that go wrong in ways that the echo engine does not."""

from __future__ import annotations

import os
import signal
import threading
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
