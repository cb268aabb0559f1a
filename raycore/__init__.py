"""raycore: inference engine cores as Ray actors, orchestrated as one fleet.

The names below are imported when they are first used: `import raycore` loads neither Ray nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycore.api import cleanup, client_actor, connect, launch, make_client, pool_status
    from raycore.client.journal import RequestOutput
    from raycore.errors import (
        AdmissionError,
        CapacityError,
        ClientClosedError,
        ConfigurationError,
        EngineDeadError,
        EngineError,
        EngineStartError,
        InvalidRequestError,
        OverloadedError,
        PauseInProgressError,
        PoolError,
        PoolNotFoundError,
        RaycoreError,
        RemoteCallError,
        RequestError,
        RequestFailedError,
        UtilityError,
    )
    from raycore.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AdmissionError",
    "CapacityError",
    "ClientClosedError",
    "ConfigurationError",
    "EngineDeadError",
    "EngineError",
    "EngineStartError",
    "InvalidRequestError",
    "OverloadedError",
    "PauseInProgressError",
    "PoolError",
    "PoolNotFoundError",
    "RaycoreError",
    "RemoteCallError",
    "RequestError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "UtilityError",
    "cleanup",
    "client_actor",
    "connect",
    "launch",
    "make_client",
    "pool_status",
]

_HOMES = {
    "SamplingParams": "raycore.sampling",
    "RequestOutput": "raycore.client.journal",
    **dict.fromkeys(("cleanup", "client_actor", "connect", "launch", "make_client", "pool_status"), "raycore.api"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module 'raycore' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(_HOMES.get(name, "raycore.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
