"""NCCL groups for tensors on one CUDA device, beside one another and apart from torch's global one. torch is imported only here."""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from typing import Any, final

import numpy as np

from raycore.errors import LockstepError
from raycore.groups import Collective, Complete, Int64s, first_line
from raycore.ids import GroupStamp

_log = logging.getLogger(__name__)

_SPIN_S = 0.002
"""For so long a collective is asked for without giving up the processor: one among ranks in step is over by then."""
_NAP_S = 0.0005
_PREPARE_S = 120.0
"""NCCL's first look at a machine with many devices and network cards takes seconds."""
_END_S = 10.0
_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""torch's own watchdog would end the process for a collective that takes too long; here that is an error of one step."""


class _Ends:
    """Groups that are being left. That frees memory, for which the device has to be idle for a moment: no other is made meanwhile."""

    def __init__(self) -> None:
        self._groups: list[Any] = []
        self._changed = threading.Condition()

    def begin(self, group: Any) -> None:
        """On a thread of its own."""
        with self._changed:
            self._groups.append(group)
        threading.Thread(target=self._end, args=(group,), name="raycore-nccl-end", daemon=True).start()

    def wait(self) -> None:
        """Until none is being left; one that takes too long is not waited for again."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._groups, _END_S):
                _log.warning("%d NCCL groups of before could not be left for %g s", len(self._groups), _END_S)
                self._groups.clear()

    def _end(self, group: Any) -> None:
        try:
            group.abort()
        except RuntimeError as error:
            _log.warning("an NCCL group could not be aborted: %s", first_line(error))
        finally:
            with self._changed:
                self._groups = [other for other in self._groups if other is not group]
                self._changed.notify_all()


_ENDS = _Ends()


def prepare(device: str) -> None:
    """Have NCCL up now: what it learns of the machine and loads on the device once a process, and not when the first group is formed.

    LockstepError where it does not work.
    """
    import torch
    import torch.distributed

    dist: Any = torch.distributed  # its C++ names are not in its stubs
    group = NcclGroup(dist.HashStore(), GroupStamp(), 0, 1, device, form_s=_PREPARE_S, collective_s=_PREPARE_S)
    row = torch.zeros(1, 1, dtype=torch.uint8, device=device)
    group.all_to_all(torch.empty_like(row), row, [1], [1])
    group.close()


@final
class NcclGroup:
    """A `ProcessGroup` on one ProcessGroupNCCL; used by the thread that steps, on its current stream.

    A collective whose peer is gone never ends by itself: each is waited for here, up to the group's limit, and then the group is aborted.
    """

    def __init__(self, store: Any, stamp: GroupStamp, rank: int, size: int, device: str, *, form_s: float, collective_s: float) -> None:
        """Meets the others at `store`, a torch Store of this group alone; blocks for up to `form_s`. LockstepError when that fails."""
        import torch
        from torch.distributed import ProcessGroupNCCL

        for name, value in _WATCHDOG.items():
            os.environ.setdefault(name, value)
        self.stamp = stamp
        self.rank = rank
        self.size = size
        self._torch: Any = torch
        self._device = torch.device(device)
        self._limit_s = form_s
        self._group: Any = None
        options: Any = ProcessGroupNCCL.Options()
        options._timeout = datetime.timedelta(seconds=max(form_s, collective_s))  # noqa: SLF001 -- it has no public name
        _ENDS.wait()
        try:
            with torch.cuda.device(self._device):
                self._group = ProcessGroupNCCL(store, rank, size, options)
                self._group.eager_connect_single_device(self._device)
            self.sum(np.ones(1, np.int64))  # makes the connections
        except (RuntimeError, LockstepError) as error:
            self.close()
            msg = f"the NCCL group of {stamp} was not formed: {first_line(error)}"
            raise LockstepError(msg) from error
        self._limit_s = collective_s

    def begin_sum(self, values: Int64s) -> Collective:
        """Sum `values` [n] int64 over all members by way of the device; it is over when this returns."""
        on_device = self._torch.from_numpy(values).to(self._device)
        self._run(lambda: self._opened().allreduce([on_device]))
        values[:] = on_device.cpu().numpy()
        return Complete()

    def sum(self, values: Int64s) -> None:
        """The same."""
        self.begin_sum(values)

    def all_to_all(self, received: Any, sent: Any, received_rows: list[int], sent_rows: list[int]) -> None:
        """Rows of uneven numbers, of CUDA tensors of any dtype."""
        from torch.distributed import AllToAllOptions

        self._run(lambda: self._opened().alltoall_base(received, sent, received_rows, sent_rows, AllToAllOptions()))

    def close(self) -> None:
        """Leave: what is in flight is given up. On a thread that no step waits for, since a peer may be gone."""
        group, self._group = self._group, None
        if group is not None:
            _ENDS.begin(group)

    def _opened(self) -> Any:
        if self._group is None:
            msg = f"the group of {self.stamp} was left"
            raise LockstepError(msg)
        return self._group

    def _run(self, begin: Any) -> None:
        """Begin a collective on this group's device and wait until it has ended there."""
        try:
            with self._torch.cuda.device(self._device):
                work = begin()
                self._wait(work)
                work.wait()
        except RuntimeError as error:
            msg = f"a collective failed: {first_line(error)}"
            raise LockstepError(msg) from error

    def _wait(self, work: Any) -> None:
        begin_s = time.monotonic()
        while not work.is_completed():
            passed_s = time.monotonic() - begin_s
            if passed_s > self._limit_s:
                self.close()
                msg = f"a collective of {self.stamp} took longer than {self._limit_s:g} s"
                raise LockstepError(msg)
            if passed_s > _SPIN_S:
                time.sleep(_NAP_S)
