"""The process group of one joiner and the ranks that send it weights: who has come to the store is known before the group is formed.

A group whose members must all come would hold up those who came for one that died on its way; so the joiner waits until all are there,
or one has failed, and tells them at the store whether to go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, final

from raycore import gloo
from raycore.errors import LockstepError
from raycore.groups import GroupKind, ProcessGroup, first_line
from raycore.ids import Epoch, GroupStamp, Term
from raycore.membership import GroupAddress

_KIND = GroupKind.WORLD
_GO, _OFF = b"go", b"off"
_DECISION = "decision"
_LOOK_S = 0.005
"""How often the joiner looks who has come."""


@final
class CopyMeeting:
    """The joiner's: serves the store, and is group rank 0."""

    def __init__(self, number: int, host: str, *, local_host: str, form_s: float, collective_s: float, device: str) -> None:
        """`number`: of the round; `host`: where the store listens."""
        self.is_begun = False
        """All have come; who fails from now on is not waited for when `close` is called."""
        self._form_s = form_s
        self._how: dict[str, Any] = {
            "host": gloo.LOOPBACK if host == gloo.LOOPBACK else local_host,
            "form_s": form_s,
            "collective_s": collective_s,
            "device": device,
        }
        self._server = gloo.GroupStore(host, limit_s=form_s)
        self.address = GroupAddress(GroupStamp(Epoch(number), Term(0)), self._server.host, {_KIND: self._server.port})
        self._store: Any = gloo.connect(self.address, _KIND, form_s=form_s)

    def form(self, size: int, has_failed: Callable[[], bool]) -> ProcessGroup:
        """The group, once all have come. LockstepError when one has failed or stays away; then the others are told so."""
        due_s = time.monotonic() + self._form_s
        keys = [f"here {rank}" for rank in range(1, size)]
        try:
            while not self._store.check(keys):
                if has_failed() or time.monotonic() > due_s:
                    self._store.set(_DECISION, _OFF)
                    raise LockstepError("a peer that was to send weights did not come")
                time.sleep(_LOOK_S)
            self.is_begun = True
            self._store.set(_DECISION, _GO)
            if has_failed():
                raise LockstepError("a peer failed before the group was formed")
        except RuntimeError as error:
            raise LockstepError(f"the store of a copy of weights is gone: {first_line(error)}") from error
        return gloo.make_group(self._store, "copy", self.address.stamp, 0, size, **self._how)

    def close(self) -> None:
        """Whoever still waits at the store fails. Idempotent."""
        self._server.close()


def join_copy(
    address: GroupAddress, rank: int, size: int, *, local_host: str, form_s: float, collective_s: float, device: str
) -> ProcessGroup:
    """A sender's: say that it is there, and form the group when all are. LockstepError when it is called off, or somebody is lost."""
    store = gloo.connect(address, _KIND, form_s=form_s)
    try:
        store.set(f"here {rank}", b"")
        decision = store.get(_DECISION)
    except RuntimeError as error:
        raise LockstepError(f"the joiner does not begin: {first_line(error)}") from error
    if decision != _GO:
        raise LockstepError("another sender failed before the group was formed")
    host = gloo.LOOPBACK if address.host == gloo.LOOPBACK else local_host
    return gloo.make_group(store, "copy", address.stamp, rank, size, host=host, form_s=form_s, collective_s=collective_s, device=device)
