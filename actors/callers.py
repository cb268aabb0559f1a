"""Who calls a client actor: what each caller has running, and its end by choice or by death."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from raycore.client.client import EngineCoreClient
from raycore.client.reader import BatchReader
from raycore.errors import InvalidRequestError


class Closable(Protocol):
    """A stream or reader of a caller's requests."""

    async def aclose(self) -> None:
        """Abort what runs."""
        ...


class _Caller:
    """One attached caller."""

    def __init__(self) -> None:
        self.running: set[Closable] = set()
        self.reader: BatchReader | None = None


class Callers:
    """Who is attached, and what each has running."""

    def __init__(self) -> None:
        self._callers: dict[str, _Caller] = {}

    def __len__(self) -> int:
        return len(self._callers)

    def attach(self, name: str) -> None:
        """A caller is here; somebody watches it."""
        self._callers.setdefault(name, _Caller())

    async def detach(self, name: str) -> None:
        """The caller is gone; what it has running is aborted. Idempotent."""
        caller = self._callers.pop(name, None)
        if caller is None:
            return
        for work in [*caller.running, *([caller.reader] if caller.reader is not None else [])]:
            await work.aclose()

    async def close(self) -> None:
        """All callers are gone."""
        for name in list(self._callers):
            await self.detach(name)

    @contextlib.contextmanager
    def running(self, name: str | None, work: Closable) -> Iterator[None]:
        """`work` is this caller's for the length of the block, and is closed when the caller goes before."""
        caller = None if name is None else self._callers.get(name)
        if caller is None:
            yield
            return
        caller.running.add(work)
        try:
            yield
        finally:
            caller.running.discard(work)

    def reader_of(self, name: str, client: EngineCoreClient) -> BatchReader:
        """The caller's reader. InvalidRequestError for one that is not attached: nobody would know of its death."""
        caller = self._callers.get(name)
        if caller is None:
            msg = f"caller {name!r} is not attached; `raycore.client_actor` gives a handle that is"
            raise InvalidRequestError(msg)
        if caller.reader is None:
            caller.reader = BatchReader(client)
        return caller.reader
