"""One engine core's process groups: the stores that it serves, and the forming of groups on threads of their own."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence

from raycore import gloo
from raycore.config import Timeouts
from raycore.errors import LockstepError, RaycoreError
from raycore.groups import GroupKind, GroupSet, ProcessGroup
from raycore.ids import EngineId, GroupStamp
from raycore.membership import GroupAddress, Handover, Membership

_STAMPS_KEPT = 3
"""Stores must outlive the forming of their groups: of the live ones, of those that stand by, and of those a late member may still form."""

OnFormed = Callable[[GroupSet, Membership], None]
OnFailed = Callable[[GroupStamp, LockstepError], None]


class GroupKeeper:
    """Forms the groups of each membership that has them; from any thread."""

    def __init__(
        self, engine: EngineId, *, node_ip: str, timeouts: Timeouts, on_formed: OnFormed, on_failed: OnFailed, device: str = "cpu"
    ) -> None:
        self._engine = engine
        self._device = device
        self._node_ip = node_ip
        self._timeouts = timeouts
        self._on_formed = on_formed
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._stores: dict[GroupStamp, dict[GroupKind, gloo.GroupStore]] = {}
        self._formed: dict[GroupStamp, concurrent.futures.Future[None]] = {}
        self._begun: set[GroupStamp] = set()

    def open_stores(self, stamp: GroupStamp, kinds: Sequence[GroupKind], *, is_one_host: bool) -> GroupAddress:
        """Bind a listener for each kind of group, hand it to its store, and say where they are; the same ones when asked again."""
        host = gloo.LOOPBACK if is_one_host else self._node_ip
        with self._lock:
            stores = self._stores.setdefault(stamp, {})
            for kind in kinds:
                if kind not in stores:
                    stores[kind] = gloo.GroupStore(host, limit_s=self._timeouts.group_s)
            while len(self._stores) > _STAMPS_KEPT:
                self._end_stores(next(iter(self._stores)))
            return GroupAddress(stamp, host, {str(kind): stores[kind].port for kind in kinds})

    def open_stores_of(self, membership: Membership, kinds: Sequence[GroupKind]) -> GroupAddress:
        """Serve the stores for a membership's own groups; on loopback where all its members are on one host."""
        is_one_host = len({member.endpoints.host for member in membership.members}) == 1
        return self.open_stores(GroupStamp(membership.epoch, membership.term), kinds, is_one_host=is_one_host)

    def close_stores(self, stamp: GroupStamp) -> None:
        """Whoever still forms these groups fails at once; formed ones do not need their stores. Idempotent."""
        with self._lock:
            self._end_stores(stamp)

    def form(self, membership: Membership) -> None:
        """Meet the other members on a thread of its own, once for each stamp; groups that are gone back to are formed already."""
        address = membership.group
        if address is None or address.goes_back or membership.group_rank(self._engine) is None:
            return
        future = self.formed(address.stamp)
        with self._lock:
            if address.stamp in self._begun:
                return
            self._begun.add(address.stamp)
        threading.Thread(target=self._form, args=(membership, address, future), name="raycore-group", daemon=True).start()

    def form_beside(self, membership: Membership) -> GroupSet:
        """The groups of a membership that may come to be, formed and warmed; blocks. LockstepError when that fails."""
        assert membership.group is not None  # noqa: S101 -- the controller asks for ports first
        with self._lock:
            self._begun.add(membership.group.stamp)
        groups = self._meet(membership, membership.group)
        try:
            groups.warm_up()
        except LockstepError:
            groups.close()
            raise
        return groups

    def form_handover(self, handover: Handover) -> ProcessGroup:
        """The group of old and new members together; blocks. LockstepError when they do not meet."""
        if self._engine.rank not in handover.ranks:
            msg = f"{self._engine} hands nothing over: that is for ranks {list(handover.ranks)}"
            raise LockstepError(msg)
        return self._connect(handover.address, handover.ranks.index(self._engine.rank), len(handover.ranks))[GroupKind.HANDOVER]

    def formed(self, stamp: GroupStamp) -> concurrent.futures.Future[None]:
        """Done when the groups of this stamp are formed here; fails with LockstepError."""
        with self._lock:
            return self._formed.setdefault(stamp, concurrent.futures.Future())

    def confirm(self, stamp: GroupStamp) -> None:
        """The groups of this stamp are in use here, and every member has made a round in them."""
        future = self.formed(stamp)
        if not future.done():
            future.set_result(None)

    def overtake(self, stamp: GroupStamp) -> None:
        """Groups of this stamp are what is wanted now: whoever waits for older ones is told."""
        with self._lock:
            older = {other: future for other, future in self._formed.items() if other < stamp}
            for other in older:
                del self._formed[other]
        for other, future in older.items():
            if not future.done():
                future.set_exception(LockstepError(f"the groups of {other} were overtaken by those of {stamp}"))

    def close(self) -> None:
        """Stop serving stores; groups that are being formed end by their limit. Idempotent."""
        with self._lock:
            for stamp in list(self._stores):
                self._end_stores(stamp)

    def _end_stores(self, stamp: GroupStamp) -> None:
        for store in self._stores.pop(stamp, {}).values():
            store.close()

    def _form(self, membership: Membership, address: GroupAddress, future: concurrent.futures.Future[None]) -> None:
        try:
            groups = self._meet(membership, address)
        except LockstepError as failure:
            if not future.done():
                future.set_exception(failure)
            self._on_failed(address.stamp, failure)
        else:
            self._on_formed(groups, membership)
            self.confirm(address.stamp)

    def _meet(self, membership: Membership, address: GroupAddress) -> GroupSet:
        rank = membership.group_rank(self._engine)
        if rank is None:
            msg = f"{self._engine} is no member of epoch {membership.epoch}"
            raise LockstepError(msg)
        return self._connect(address, rank, len(membership.members))

    def _connect(self, address: GroupAddress, rank: int, size: int) -> GroupSet:
        limits = self._timeouts
        try:
            limits_s = {"form_s": limits.group_s, "collective_s": limits.collective_s}
            return gloo.form_groups(address, rank, size, local_host=self._node_ip, device=self._device, **limits_s)
        except RaycoreError as error:
            raise error if isinstance(error, LockstepError) else LockstepError(str(error)) from error
