"""Which engines there are: a name and options in, an engine out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from raycore.engine import Engine
from raycore.errors import ConfigurationError

OptionsT = TypeVar("OptionsT", bound=msgspec.Struct)


def make_engine(
    name: str, model: str | None = None, options: Mapping[str, Any] | None = None, device: str = "cpu", *, rank: int | None = None
) -> Engine:
    """The engine called `name`: "echo", "torch", or "module:function" for `function(model=, options=, device=)`.

    `options["per_rank"]` maps a rank (as text) to options that replace the others' on that rank. An unknown name or wrong options raise
    ConfigurationError; what goes wrong while an engine loads is raised as it is.
    """
    own = _options_of_rank(options or {}, rank)
    factory = _FACTORIES.get(name)
    if factory is not None:
        return factory(model, own, device)
    if ":" in name:
        return _foreign_engine(name)(model=model, options=own, device=device)
    msg = f"no engine is called {name!r}; there are {', '.join(map(repr, _FACTORIES))} and 'module:function'"
    raise ConfigurationError(msg)


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


def _make_echo(model: str | None, options: dict[str, Any], device: str) -> Engine:
    from raycore.engines.echo import EchoEngine, EchoOptions  # only the chosen engine is imported

    del device
    parsed = _convert("echo", options, EchoOptions)
    if parsed.fail_start is not None:
        raise RuntimeError(parsed.fail_start)
    return EchoEngine(parsed, model=model or "echo")


def _make_torch(model: str | None, options: dict[str, Any], device: str) -> Engine:
    if model is None:
        msg = "engine 'torch' needs a model: a checkpoint directory or a GGUF file"
        raise ConfigurationError(msg)
    from raycore.engines.torch import TorchEngine, TorchEngineOptions  # torch takes seconds to import

    return TorchEngine.create(_convert("torch", {**options, "model": model, "device": device}, TorchEngineOptions))


def _foreign_engine(name: str) -> Callable[..., Engine]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        msg = f"engine {name!r}: cannot import {module_name!r}: {error}"
        raise ConfigurationError(msg) from error
    try:
        factory: Callable[..., Engine] = getattr(module, function_name)
    except AttributeError as error:
        msg = f"engine {name!r}: {module_name!r} has no function {function_name!r}"
        raise ConfigurationError(msg) from error
    return factory


_FACTORIES: dict[str, Callable[[str | None, dict[str, Any], str], Engine]] = {"echo": _make_echo, "torch": _make_torch}
