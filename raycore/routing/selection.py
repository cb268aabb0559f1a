"""Which policies there are: a name and options in, a router out; or an object or import path of a user's own."""

from __future__ import annotations

import importlib
import inspect
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from raycore.config import DEFAULT_ROUTER
from raycore.errors import ConfigurationError
from raycore.routing.balanced import WorkBalanced
from raycore.routing.ledger import EngineLedger
from raycore.routing.prefixes import PrefixWork
from raycore.routing.query import Query
from raycore.routing.reference import ReferenceFloorRule, ReferenceRule
from raycore.routing.router import Candidate, Randomness, Router
from raycore.routing.simple import LeastRequests, RandomChoice, RoundRobin, TwoChoices

_BY_CHANCE: dict[str, Callable[..., Router]] = {
    "work": WorkBalanced,
    "prefix": PrefixWork,
    "two-choices": TwoChoices,
    "least-requests": LeastRequests,
    "round-robin": RoundRobin,
    "random": RandomChoice,
}
_BY_CLOCK: dict[str, Callable[..., Router]] = {"reference": ReferenceRule, "reference-floor": ReferenceFloorRule}

NAMES = (*_BY_CHANCE, *_BY_CLOCK)


def make_router(
    router: str | object = DEFAULT_ROUTER,
    options: Mapping[str, Any] | None = None,
    *,
    randomness: Randomness | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Router:
    """The policy called `router`, an object with a `choose(query, ledgers)`, or "module:name" of one or of a function that makes one.

    ConfigurationError for an unknown name, options that the policy does not take, or an object that cannot choose.
    """
    given = dict(options or {})
    if not isinstance(router, str):
        if given:
            msg = "router_options go with a router's name; a router given as an object has its options already"
            raise ConfigurationError(msg)
        return _own(router, "the router given")
    if router in _BY_CHANCE:
        chance = randomness if randomness is not None else random.Random()
        return _made(router, _BY_CHANCE[router], chance, given)
    if router in _BY_CLOCK:
        return _made(router, _BY_CLOCK[router], clock, given)
    if ":" in router:
        return _imported(router, given)
    msg = f"no router is called {router!r}; there are {', '.join(map(repr, NAMES))} and 'module:name'"
    raise ConfigurationError(msg)


def router_name(router: str | object) -> str:
    """What decisions are explained under."""
    return router if isinstance(router, str) else type(router).__name__


def _made(name: str, factory: Callable[..., Router], source: object, options: dict[str, Any]) -> Router:
    known = [each.name for each in inspect.signature(factory).parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = [option for option in options if option not in known]
    if unknown:
        msg = f"router {name!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(map(repr, known)) or 'none'}"
        raise ConfigurationError(msg)
    try:
        return factory(source, **options)
    except TypeError as error:
        msg = f"options of router {name!r}: {error}"
        raise ConfigurationError(msg) from error


def _imported(path: str, options: dict[str, Any]) -> Router:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        msg = f"router {path!r} cannot be imported: {error}"
        raise ConfigurationError(msg) from error
    if inspect.isclass(found) or not hasattr(found, "choose"):
        if not callable(found):
            msg = f"router {path!r} is neither a router nor a function that makes one"
            raise ConfigurationError(msg)
        try:
            found = found(**options)
        except TypeError as error:
            msg = f"options of router {path!r}: {error}"
            raise ConfigurationError(msg) from error
    return _own(found, f"router {path!r}")


def _own(router: Any, what: str) -> Router:
    if inspect.isclass(router) or not callable(getattr(router, "choose", None)):
        msg = f"{what} has no choose(query, ledgers)"
        raise ConfigurationError(msg)
    return router if callable(getattr(router, "reasons", None)) else _WithoutReasons(router)


@final
class _WithoutReasons:
    """A user's policy that does not say why."""

    def __init__(self, router: Any) -> None:
        self._router = router

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """As it chooses."""
        return self._router.choose(query, ledgers)

    def reasons(self) -> Sequence[Candidate]:
        """None."""
        return ()
