"""The requests of one engine core: handles, whose they are, and the split of a step's columns by session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np

from raycore.core.sessions import Session
from raycore.engine import EMPTY, Detail, LogprobRows, StepOutput, TokenArray
from raycore.errors import sendable
from raycore.ids import Slot
from raycore.messages import LogprobColumns, StepColumns

_GROWTH = 1024


class RequestTable:
    """Dense handles over all sessions. A handle is free again once the engine has forgotten it."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._size = 0
        self._slot_of: TokenArray = EMPTY
        self._owner_number: TokenArray = EMPTY
        self._owner: list[Session | None] = []
        self._request_id: list[str] = []
        self._offset: dict[int, int] = {}
        self._number_of: dict[bytes, int] = {}
        self._sessions: list[Session | None] = []
        self._split_handles: TokenArray | None = None
        self._split: list[tuple[Session, TokenArray, TokenArray]] = []

    def __len__(self) -> int:
        return self._size - len(self._free)

    def add(self, session: Session, slot: int, request_id: str, delivered: int) -> int:
        """A handle for a new request; `delivered` tokens of it are known to the client."""
        if not self._free:
            self._grow()
        handle = self._free.pop()
        self._slot_of[handle] = slot
        self._owner_number[handle] = self._number(session)
        self._owner[handle] = session
        self._request_id[handle] = request_id
        session.handle_of[slot] = handle
        if delivered:
            self._offset[handle] = delivered
        return handle

    def remove(self, handle: int) -> tuple[Session, int] | None:
        """Free a handle; its session and slot, or None when it is free already."""
        session = self._owner[handle] if 0 <= handle < self._size else None
        if session is None:
            return None
        slot = int(self._slot_of[handle])
        self._owner[handle] = None
        session.handle_of.pop(slot, None)
        if self._offset:
            self._offset.pop(handle, None)
        self._free.append(handle)
        self._split_handles = None
        return session, slot

    def forget_session(self, session: Session) -> None:
        """The session ended and has no requests left."""
        number = self._number_of.pop(session.id, None)
        if number is not None:
            self._sessions[number] = None

    def request_id(self, handle: int) -> str:
        """The request's id, for a person."""
        return self._request_id[handle]

    def handles(self) -> Iterator[int]:
        """Every handle in use."""
        return (handle for handle, owner in enumerate(self._owner) if owner is not None)

    def columns(self, output: StepOutput, stamp_ns: int) -> list[tuple[Session, StepColumns]]:
        """Each session's share of a step; frees the finished handles."""
        shares = self._shares(output)
        ends = self._ends(output) if len(output.finished) else {}
        details = self._details(output.details) if output.details else {}
        offsets = self._first_offsets(output.handles) if self._offset else {}
        logprobs = self._logprobs(output.logprobs) if output.logprobs else {}
        result: list[tuple[Session, StepColumns]] = []
        for session, slots, tokens, counts in shares:
            finished, reasons = ends.pop(session.id, (b"", b""))
            is_same = slots is session.previous_slots
            session.previous_slots = slots
            columns = StepColumns(
                b"" if is_same else slots.tobytes(),
                tokens.tobytes(),
                b"" if counts is None else counts.tobytes(),
                finished,
                reasons,
                stamp_ns,
                details.get(session.id, []),
                offsets.get(session.id, []),
                logprobs.get(session.id, []),
            )
            result.append((session, columns))
        for session_id, (finished, reasons) in ends.items():
            session = self._session(session_id)
            result.append((session, StepColumns(b"", b"", b"", finished, reasons, stamp_ns, details.get(session_id, []))))
        self._free_finished(output.finished)
        return result

    def _shares(self, output: StepOutput) -> list[tuple[Session, TokenArray, TokenArray, TokenArray | None]]:
        if not len(output.handles):
            return []
        if output.handles is not self._split_handles:
            self._split = self._split_by_session(output.handles)
            self._split_handles = output.handles
        counts = output.counts
        if len(self._split) == 1:
            session, _, slots = self._split[0]
            return [(session, slots, output.tokens, counts)]
        shares: list[tuple[Session, TokenArray, TokenArray, TokenArray | None]] = []
        for session, rows, slots in self._split:
            if counts is None:
                shares.append((session, slots, output.tokens[rows], None))
            else:
                shares.append((session, slots, output.tokens[np.repeat(rows, counts)], counts[rows]))
        return shares

    def _split_by_session(self, handles: TokenArray) -> list[tuple[Session, TokenArray, TokenArray]]:
        """(session, mask of its rows, its slots) for one set of handles; kept while the engine's batch is unchanged."""
        slots = self._slot_of[handles]
        only = self._only_session()
        if only is not None:
            return [(only, EMPTY, slots)]
        numbers = self._owner_number[handles]
        first = int(numbers[0])
        if not (numbers != first).any():
            return [(self._by_number(first), EMPTY, slots)]
        parts: list[tuple[Session, TokenArray, TokenArray]] = []
        for number in np.unique(numbers).tolist():
            rows = numbers == number
            parts.append((self._by_number(number), rows, slots[rows]))
        return parts

    def _ends(self, output: StepOutput) -> dict[bytes, tuple[bytes, bytes]]:
        finished, reasons = output.finished, output.reasons
        slots = self._slot_of[finished]
        only = self._only_session()
        if only is not None:
            return {only.id: (slots.tobytes(), reasons)}
        numbers = self._owner_number[finished]
        first = int(numbers[0])
        if not (numbers != first).any():
            return {self._by_number(first).id: (slots.tobytes(), reasons)}
        reason_column = np.frombuffer(reasons, np.uint8)
        ends: dict[bytes, tuple[bytes, bytes]] = {}
        for number in np.unique(numbers).tolist():
            rows = numbers == number
            ends[self._by_number(number).id] = (slots[rows].tobytes(), reason_column[rows].tobytes())
        return ends

    def _details(self, details: Sequence[tuple[int, Detail]]) -> dict[bytes, list[tuple[Slot, Detail]]]:
        by_session: dict[bytes, list[tuple[Slot, Detail]]] = {}
        for handle, detail in details:
            session = self._owner[handle]
            if session is not None:
                by_session.setdefault(session.id, []).append((Slot(int(self._slot_of[handle])), _sendable(detail)))
        return by_session

    def _first_offsets(self, handles: TokenArray) -> dict[bytes, list[tuple[Slot, int]]]:
        by_session: dict[bytes, list[tuple[Slot, int]]] = {}
        for handle in set(self._offset).intersection(handles.tolist()):
            session = self._owner[handle]
            if session is not None:
                by_session.setdefault(session.id, []).append((Slot(int(self._slot_of[handle])), self._offset.pop(handle)))
        return by_session

    def _logprobs(self, parts: Sequence[LogprobRows]) -> dict[bytes, list[LogprobColumns]]:
        by_session: dict[bytes, list[LogprobColumns]] = {}
        for part in parts:
            slots, numbers = self._slot_of[part.handles], self._owner_number[part.handles]
            for number in np.unique(numbers).tolist():
                rows = numbers == number
                alternatives = np.repeat(rows, part.widths)
                columns = LogprobColumns(
                    slots[rows].tobytes(),
                    part.token_ids[rows].tobytes(),
                    part.logprobs[rows].tobytes(),
                    part.ranks[rows].tobytes(),
                    part.widths[rows].tobytes(),
                    part.top_ids[alternatives].tobytes(),
                    part.top_logprobs[alternatives].tobytes(),
                    part.of_prompt,
                )
                by_session.setdefault(self._by_number(number).id, []).append(columns)
        return by_session

    def _free_finished(self, finished: TokenArray) -> None:
        if not len(finished):
            return
        owners, free, slots = self._owner, self._free, self._slot_of[finished].tolist()
        for handle, slot in zip(finished.tolist(), slots, strict=True):
            session = owners[handle]
            if session is not None:
                owners[handle] = None
                del session.handle_of[slot]
                free.append(handle)
        if self._offset:
            for handle in finished.tolist():
                self._offset.pop(handle, None)
        self._split_handles = None

    def _grow(self) -> None:
        size = self._size + _GROWTH
        for name in ("_slot_of", "_owner_number"):
            column = np.zeros(size, np.uint32)
            column[: self._size] = getattr(self, name)
            setattr(self, name, column)
        self._owner.extend([None] * _GROWTH)
        self._request_id.extend([""] * _GROWTH)
        self._free.extend(range(size - 1, self._size - 1, -1))
        self._size = size

    def _number(self, session: Session) -> int:
        number = self._number_of.get(session.id)
        if number is None:
            number = next((n for n, taken in enumerate(self._sessions) if taken is None), len(self._sessions))
            if number == len(self._sessions):
                self._sessions.append(None)
            self._sessions[number] = session
            self._number_of[session.id] = number
            self._split_handles = None
        return number

    def _only_session(self) -> Session | None:
        """The session of every request, when there is just one that has any."""
        if len(self._number_of) != 1:
            return None
        return self._by_number(next(iter(self._number_of.values())))

    def _by_number(self, number: int) -> Session:
        session = self._sessions[number]
        assert session is not None  # noqa: S101 -- a session is forgotten only after its requests
        return session

    def _session(self, session_id: bytes) -> Session:
        return self._by_number(self._number_of[session_id])

    def check_invariants(self, live: Iterable[Session]) -> None:
        """Raise AssertionError when handles, owners and slots disagree."""
        used = {handle for session in live for handle in session.handle_of.values()}
        assert used == set(self.handles()), "sessions and table disagree"  # noqa: S101
        assert not used.intersection(self._free), "a handle is both used and free"  # noqa: S101
        assert len(used) + len(self._free) == self._size, "a handle was lost"  # noqa: S101


def _sendable(detail: Detail) -> Detail:
    reason = sendable(detail.stop_reason) if isinstance(detail.stop_reason, str) else detail.stop_reason
    return msgspec.structs.replace(detail, stop_reason=reason, error_message=sendable(detail.error_message))
