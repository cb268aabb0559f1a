"""LoRA adapters that callers name as models: the names that every rank has, asked of the engines when somebody wants to know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from raycore.client.client import EngineCoreClient
from raycore.errors import NotSupportedError, RaycoreError

_FRESH_S = 1.0
"""An answer is good for so long: callers of unknown models do not make a call on the engines each."""
_ANSWER_S = 5.0


class AdapterNames:
    """Of one pool's engines."""

    def __init__(self, client: EngineCoreClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._names: frozenset[str] = frozenset()
        self._asked_at_s = float("-inf")
        self._asking = asyncio.Lock()

    async def all(self) -> frozenset[str]:
        """The adapters that every rank which answers has loaded; the last ones known where none does."""
        async with self._asking:
            if self._clock() - self._asked_at_s >= _FRESH_S:
                self._names = await self._ask()
                self._asked_at_s = self._clock()
            return self._names

    async def _ask(self) -> frozenset[str]:
        try:
            answers = (await self._client.call_all("lora_names", timeout_s=_ANSWER_S)).values()
        except NotSupportedError:
            return frozenset()
        except RaycoreError:
            return self._names
        if any(isinstance(answer, NotSupportedError) for answer in answers):
            return frozenset()
        named = [frozenset(answer) for answer in answers if isinstance(answer, dict)]
        return frozenset.intersection(*named) if named else self._names
