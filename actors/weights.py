"""A joiner's peers behind Ray calls: whom it asks for weights, and how their answers come."""

from __future__ import annotations

import concurrent.futures
from typing import Any, final

import msgspec
import ray.exceptions

from actors.remote import translate
from raycore.ids import EngineId
from raycore.weight_copies import WeightOffer, WeightRequest, WeightTerms


class Giver(msgspec.Struct, frozen=True):
    """A rank that serves, as a joiner is told of it."""

    engine: EngineId
    host: str
    handle: Any


@final
class RayPeer:
    """Implements `raycore.weight_copies.WeightPeer` on a giver's actor."""

    def __init__(self, giver: Giver) -> None:
        self.engine = giver.engine
        self.host = giver.host
        self._handle = giver.handle

    def offer(self) -> concurrent.futures.Future[WeightOffer | None]:
        """Ask for its offer."""
        return self._asked(self._handle.weight_offer.remote(), "offer of weights")

    def terms(self) -> concurrent.futures.Future[WeightTerms | None]:
        """Ask on which terms it would give now."""
        return self._asked(self._handle.weight_terms.remote(), "terms of weights")

    def give(self, request: WeightRequest) -> concurrent.futures.Future[int]:
        """Have it send."""
        return self._asked(self._handle.give_weights.remote(request), "weights")

    def _asked(self, ref: Any, what: str) -> concurrent.futures.Future[Any]:
        """Ray's future, with our errors."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def hand_on(answer: concurrent.futures.Future[Any]) -> None:
            error = answer.exception()
            if error is None:
                future.set_result(answer.result())
            elif isinstance(error, ray.exceptions.RayError):
                future.set_exception(translate(error, what=f"{self.engine}: {what}", engine=self.engine))
            else:
                future.set_exception(error)

        ref.future().add_done_callback(hand_on)
        return future
