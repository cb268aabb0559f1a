"""Which engines there are: a name and options in, an engine out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import msgspec

from raycore.engine import Engine
from raycore.errors import ConfigurationError
from raycore.weight_copies import WeightSource

WITHOUT_WEIGHTS = frozenset({"echo"})
"""Engines that cost nothing to make."""

OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)


class Place(NamedTuple):
    """An engine's rank (None: it has none yet), how many ranks its pool has (0 without a pool), and whether it joins one that runs."""

    rank: int | None
    size: int
    is_joining: bool = False
    peers: WeightSource | None = None
    """Those that serve already, where it is to have its weights from them."""


def make_engine(
    name: str,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    *,
    rank: int | None = None,
    size: int = 0,
    is_joining: bool = False,
    peers: WeightSource | None = None,
) -> Engine:
    """The engine called `name`: "echo", "torch", or "module:function" for `function(model=, options=, device=)`.

    `options["per_rank"]` maps a rank (as text) to options that replace the others' on that rank. `size`: ranks of the pool, 0 without one;
    `is_joining`: it runs already; `peers`: the ranks from which the engine may take its weights.
    An unknown name or wrong options raise
    ConfigurationError; what goes wrong while an engine loads is raised as it is.
    """
    own = _options_of_rank(options or {}, rank)
    factory = _FACTORIES.get(name)
    if factory is not None:
        return factory(model, own, device, Place(rank, size, is_joining, peers))
    if ":" in name:
        return _foreign_engine(name, model, own, device)
    msg = f"no engine is called {name!r}; there are {', '.join(map(repr, _FACTORIES))} and 'module:function'"
    raise ConfigurationError(msg)


def import_engine(name: str, device: str = "cpu") -> None:
    """Have this engine's libraries and device up, so that making it has only its weights to load. ConfigurationError as `make_engine`."""
    if name == "torch":
        from raycore.engines.torch.loading import initialise  # torch takes seconds to import

        initialise(device)
    elif ":" in name:
        _import_module(name)


def has_own_options(options: Mapping[str, Any], rank: int) -> bool:
    """Whether an engine of this rank is another one than was made before its rank was known."""
    return _options_of_rank(options, rank) != _options_of_rank(options, None)


def _options_of_rank(options: Mapping[str, Any], rank: int | None) -> dict[str, Any]:
    own = dict(options)
    given: object = own.pop("per_rank", None) or {}
    try:
        per_rank = msgspec.convert(given, dict[int | str, dict[str, Any]], strict=False)
    except msgspec.ValidationError as error:
        msg = f"engine_options['per_rank'] maps ranks to options: {error}"
        raise ConfigurationError(msg) from error
    if rank is not None:
        own.update(per_rank.get(rank) or per_rank.get(str(rank)) or {})
    return own


def _convert(name: str, options: Mapping[str, Any], kind: type[OptionsT]) -> OptionsT:
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        msg = f"options of engine {name!r}: {error}"
        raise ConfigurationError(msg) from error


def _make_echo(model: str | None, options: dict[str, Any], device: str, place: Place) -> Engine:
    from raycore.engines.echo import EchoEngine, EchoOptions  # only the chosen engine is imported

    del device, place
    parsed = _convert("echo", options, EchoOptions)
    if parsed.fail_start is not None:
        raise RuntimeError(parsed.fail_start)
    return EchoEngine(parsed, model=model or "echo")


def _make_torch(model: str | None, options: dict[str, Any], device: str, place: Place) -> Engine:
    if model is None:
        msg = "engine 'torch' needs a model: a checkpoint directory or a GGUF file"
        raise ConfigurationError(msg)
    from raycore.engines.torch import TorchEngineOptions, make_torch_engine  # torch takes seconds to import

    # Of a pool's experts nobody has a share before it has a rank: it is given one when it joins.
    is_joining = place.is_joining or (place.rank is None and place.size > 0)
    set_here = {"model": model, "device": device, "rank": place.rank or 0, "data_parallel_size": place.size, "is_joining": is_joining}
    return make_torch_engine(_convert("torch", {**options, **set_here}, TorchEngineOptions), place.peers)


def _import_module(name: str) -> ModuleType:
    module_name = name.partition(":")[0]
    try:
        return importlib.import_module(module_name)
    except (ImportError, TypeError) as error:  # TypeError: a relative name
        msg = f"engine {name!r}: cannot import {module_name!r}: {error}"
        raise ConfigurationError(msg) from error


def _foreign_engine(name: str, model: str | None, options: dict[str, Any], device: str) -> Engine:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        msg = f"engine {name!r}: 'module:function' names an importable module and a function of it"
        raise ConfigurationError(msg)
    module = _import_module(name)
    try:
        factory: object = getattr(module, function_name)
    except AttributeError as error:
        msg = f"engine {name!r}: {module_name!r} has no function {function_name!r}"
        raise ConfigurationError(msg) from error
    if not callable(factory):
        msg = f"engine {name!r}: {function_name!r} is no function, but a {type(factory).__name__}"
        raise ConfigurationError(msg)
    engine: Any = factory(model=model, options=options, device=device)
    missing = [part for part in _PARTS if not hasattr(engine, part)]
    if missing:
        msg = f"engine {name!r} made a {type(engine).__name__}, which lacks {', '.join(missing)} of the Engine Protocol (docs/engines.md)"
        raise ConfigurationError(msg)
    return engine


_PARTS = ("info", "add", "abort", "step", "has_work", "idle_step", "load", "utilities", "rpc_methods", "budget_s", "close")
"""Of the Engine Protocol; asked of foreign engines once, so that what is missing is named at the start and not at the first call."""

_FACTORIES: dict[str, Callable[[str | None, dict[str, Any], str, Place], Engine]] = {"echo": _make_echo, "torch": _make_torch}
