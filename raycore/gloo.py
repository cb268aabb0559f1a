"""Gloo groups made from stores at given addresses, beside one another and apart from torch's global one. torch is imported only here."""

from __future__ import annotations

import datetime
import logging
import os
import socket as sockets
import threading
from collections.abc import Callable
from typing import Any, final

from raycore.errors import LockstepError
from raycore.groups import Collective, GroupKind, GroupSet, Int64s, LocalGroup, ProcessGroup, first_line
from raycore.ids import GroupStamp
from raycore.membership import GroupAddress
from raycore.nccl import NcclGroup

_log = logging.getLogger(__name__)

_BACKLOG = 1024
_TIMED_OUT = "timed out"
"""What torch's RuntimeError says when a wait, and not the collective, has come to its end."""

_CONNECT_S = 10.0
"""A store listens before anyone is told of it, so one that cannot be reached is gone: nobody waits for the others there."""
_SHORTEST_S = 1e-3
"""torch takes a wait of no time for one without end."""
LOOPBACK = "127.0.0.1"
_OF_EXPERTS = frozenset({GroupKind.EP, GroupKind.EPLB, GroupKind.HANDOVER})


def prepare() -> None:
    """Import torch now, which takes seconds, and not when the first group is formed."""
    # torch looks up the name of every peer that it connects to, ::ffff:127.0.0.1 too, only to print it: a slow name server costs 5 s a time
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    dist = _distributed()
    if not dist.is_available() or not dist.is_gloo_available():
        msg = "this build of torch has no Gloo, which ranks in lockstep need"
        raise LockstepError(msg)


def _distributed() -> Any:
    """torch's module, untyped: its C++ names are not in its stubs."""
    import torch.distributed

    return torch.distributed


@final
class GroupStore:
    """A TCPStore that this process serves: bound on port 0 here, so that its address is true before anyone is told."""

    def __init__(self, host: str, *, limit_s: float) -> None:
        dist = _distributed()
        family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
        with sockets.socket(family, sockets.SOCK_STREAM) as listener:
            listener.bind((host, 0))
            listener.listen(_BACKLOG)
            self.host, self.port = host, listener.getsockname()[1]
            descriptor = listener.detach()
        self._store: Any = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=limit_s),
            master_listen_fd=descriptor,
        )

    def close(self) -> None:
        """Stop serving. Idempotent; groups that are formed do not need it any more."""
        self._store = None


def form_groups(
    address: GroupAddress, rank: int, size: int, *, local_host: str, form_s: float, collective_s: float, device: str = "cpu"
) -> GroupSet:
    """Meet the other members at the stores and connect to all of them; blocks for up to `form_s` a group. LockstepError when that fails.

    `rank` is the dense group rank. `local_host`: this node's address, on which Gloo listens; ignored where the stores are on loopback.
    `device`: where experts and their rows are; with "cuda" the groups that carry them are NCCL's.
    """
    groups: dict[GroupKind, ProcessGroup] = {}
    host = LOOPBACK if address.host == LOOPBACK else local_host
    try:
        for kind in map(GroupKind, address.ports):
            if size == 1:
                groups[kind] = LocalGroup(address.stamp)
            else:
                on_device = device != "cpu" and kind in _OF_EXPERTS
                groups[kind] = _form(address, kind, rank, size, host, form_s, collective_s, device if on_device else "cpu")
    except LockstepError:
        GroupSet(address.stamp, groups).close()
        raise
    return GroupSet(address.stamp, groups)


def _form(
    address: GroupAddress, kind: GroupKind, rank: int, size: int, host: str, form_s: float, collective_s: float, device: str
) -> ProcessGroup:
    store = connect(address, kind, form_s=form_s)
    return make_group(
        store, f"{kind} {address.stamp}", address.stamp, rank, size, host=host, form_s=form_s, collective_s=collective_s, device=device
    )


def connect(address: GroupAddress, kind: GroupKind, *, form_s: float) -> Any:
    """A store where members meet, whose waits last up to `form_s`. LockstepError when nobody serves it."""
    dist = _distributed()
    try:
        # torch asks again and again, for twice the limit, where nobody listens; here that is an answer: the store's operation was undone
        sockets.create_connection((address.host, address.ports[kind]), min(form_s, _CONNECT_S)).close()
        store = dist.TCPStore(
            address.host,
            address.ports[kind],
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=min(form_s, _CONNECT_S)),
        )
        store.set_timeout(datetime.timedelta(seconds=form_s))
    except OSError as error:
        msg = f"the {kind} group of {address.stamp} was not formed: its store cannot be reached: {error}"
        raise LockstepError(msg) from error
    except RuntimeError as error:
        msg = f"the {kind} group of {address.stamp} was not formed: {first_line(error)}"
        raise LockstepError(msg) from error
    return store


def make_group(
    store: Any,
    name: str,
    stamp: GroupStamp,
    rank: int,
    size: int,
    *,
    host: str,
    form_s: float,
    collective_s: float,
    device: str,
) -> ProcessGroup:
    """Meet the others at a store under this name; Gloo listens on `host`. LockstepError when they do not come in time."""
    dist = _distributed()
    try:
        prefixed = dist.PrefixStore(name, store)
        if device != "cpu":
            return NcclGroup(prefixed, stamp, rank, size, device, form_s=form_s, collective_s=collective_s)
        options: Any = dist.ProcessGroupGloo._Options()  # noqa: SLF001 -- the public constructor takes no device, and listens where it likes
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001 -- as above
        options._timeout = datetime.timedelta(seconds=form_s)  # noqa: SLF001 -- as above
        options._threads = 1  # noqa: SLF001 -- as above; one collective is in flight at a time
        group: Any = dist.ProcessGroupGloo(prefixed, rank, size, options)
    except RuntimeError as error:
        msg = f"the {name} group was not formed: {first_line(error)}"
        raise LockstepError(msg) from error
    return GlooGroup(group, stamp, rank, size, collective_s)


@final
class GlooGroup:
    """A `ProcessGroup` on one ProcessGroupGloo."""

    def __init__(self, group: Any, stamp: GroupStamp, rank: int, size: int, collective_s: float) -> None:
        self.stamp = stamp
        self.rank = rank
        self.size = size
        self._group: Any = group
        self._limit_s = collective_s
        group.set_timeout(datetime.timedelta(seconds=collective_s))

    def begin_sum(self, values: Int64s) -> Collective:
        """Begin an all-reduce on `values` itself."""
        import torch

        if self._group is None:
            msg = f"the group of {self.stamp} was left"
            raise LockstepError(msg)
        try:
            return _GlooWork(self._group.allreduce([torch.from_numpy(values)]), values)
        except RuntimeError as error:
            raise _failed(error) from error

    def sum(self, values: Int64s) -> None:
        """Begin and wait."""
        if not self.begin_sum(values).wait(self._limit_s):
            msg = f"a collective of {self.stamp} took longer than {self._limit_s:g} s"
            raise LockstepError(msg)

    def all_to_all(self, received: Any, sent: Any, received_rows: list[int], sent_rows: list[int]) -> None:
        """Rows of uneven numbers; of any dtype that Gloo knows, which bytes are."""
        if self._group is None:
            msg = f"the group of {self.stamp} was left"
            raise LockstepError(msg)
        try:
            options = _distributed().AllToAllOptions()
            work = _GlooWork(self._group.alltoall_base(received, sent, received_rows, sent_rows, options), (received, sent))
        except RuntimeError as error:
            raise _failed(error) from error
        if not work.wait(self._limit_s):
            msg = f"an exchange of {self.stamp} took longer than {self._limit_s:g} s"
            raise LockstepError(msg)

    def close(self) -> None:
        """Let go of the group. Its destructor waits for what is in flight, so it runs on a thread that nobody waits for."""
        group, self._group = self._group, None
        if group is not None:
            holder = [group]
            del group
            threading.Thread(target=holder.clear, name="raycore-group-end", daemon=True).start()


@final
class _GlooWork:
    """One collective; keeps its buffers alive."""

    def __init__(self, work: Any, buffers: object) -> None:
        self._work = work
        self._buffers = buffers

    def wait(self, timeout_s: float) -> bool:
        """Wait on torch's own condition: the shortest way from the last peer's contribution to here."""
        try:
            self._work.wait(datetime.timedelta(seconds=max(timeout_s, _SHORTEST_S)))
        except RuntimeError as error:
            if not self._work.is_completed() and _TIMED_OUT in str(error).lower():
                return False
            self._check()
        return True

    def _check(self) -> None:
        """It has ended, perhaps just after a wait did: a second wait returns at once, or says why it failed."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise _failed(error) from error

    def notify(self, on_end: Callable[[], None]) -> None:
        """Called from one of Gloo's threads."""
        self._work.get_future().add_done_callback(lambda _future: on_end())


def _failed(error: RuntimeError) -> LockstepError:
    return LockstepError(f"a collective failed: {first_line(error)}")
