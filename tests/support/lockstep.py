"""Ranks in lockstep in this process: engine hosts on threads, a real Gloo group, no Ray."""

from __future__ import annotations

import concurrent.futures
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec

from elastic.expert_change import plan_change
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.config import EngineSpec, HealthConfig, Limits, Timeouts
from raycore.core.host import EngineHost
from raycore.core.lockstep import Lockstep
from raycore.engines.expert_change import ExpertChange
from raycore.groups import EPOCH_KINDS, GroupKind
from raycore.ids import Epoch, GroupStamp, Rank, Term
from raycore.membership import Handover, Member, Membership, RankType, ReconfigureDistributedRequest
from raycore.tokenizer import ByteTokenizer
from tests.support.waiting import LIMIT_S, until, wait_until

QUICK = Timeouts(group_s=20, collective_s=20, regroup_s=20)


class LockstepPool:
    """Hosts of engines in lockstep, echo unless a mixture of experts is named; `decide` does what a controller would."""

    def __init__(self, size: int, *, timeouts: Timeouts = QUICK, mixture: Path | None = None, joiners: int = 0, **options: Any) -> None:
        """`mixture`: a checkpoint of which the first `size` ranks share the experts, and the `joiners` after them hold none."""
        self.name = f"w{secrets.token_hex(4)}"
        self.timeouts = timeouts
        self.mixture = mixture
        self.size = size
        self.options = {"kv_tokens": 1024, "threads": 1, **options} if mixture else {"lockstep": True, "max_sequences": 64, **options}
        self.hosts = [self._host(rank) for rank in range(size + joiners)]
        self.members: list[Member] = [host.start() for host in self.hosts]
        self.threads = [threading.Thread(target=self._run, args=(host,), daemon=True) for host in self.hosts]
        self.raised: list[BaseException] = []
        self.membership = Membership(self.name, Epoch(0), Term(1))
        for thread in self.threads:
            thread.start()

    def decide(self, *ranks: int, has_group: bool = True, wait: bool = True) -> Membership:
        """A new epoch of these ranks: all hosts are told, the members form its group."""
        epoch = Epoch(self.membership.epoch + 1)
        members = tuple(self.members[rank] for rank in ranks)
        group = self.hosts[ranks[0]].groups.open_stores(GroupStamp(epoch, Term(1)), EPOCH_KINDS, is_one_host=True) if has_group else None
        self.membership = Membership(self.name, epoch, Term(1), members, group=group)
        for rank in range(len(self.hosts)):
            if self.threads[rank].is_alive():
                self.hosts[rank].set_membership(self.membership)
        if group is not None and wait:
            for rank in ranks:
                self.hosts[rank].groups.formed(group.stamp).result(LIMIT_S)
        return self.membership

    def prepare(self, *ranks: int, operation: str = "op", absent: tuple[int, ...] = ()) -> Membership:
        """Standby groups of these ranks beside the live ones, at every rank that is or will be a member; raises the first error."""
        now = self.membership
        bare = Membership(self.name, Epoch(now.epoch + 1), Term(1), tuple(self.members[rank] for rank in ranks))
        group = self.hosts[ranks[0]].groups.open_stores_of(bare, EPOCH_KINDS)
        then = msgspec.structs.replace(bare, group=group)
        before = tuple(member.engine.rank for member in now.members)
        plan = None if self.mixture is None else self._expert_plan(before, tuple(member.engine.rank for member in then.members))
        handover = None if plan is None or set(before) <= set(ranks) else self._handover(then)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            calls = [
                threads.submit(
                    self.hosts[rank].reconfigurer.prepare,
                    ReconfigureDistributedRequest(
                        operation, Term(1), RankType.KEEP if rank in ranks else RankType.SHUTDOWN, then, before, plan, handover
                    ),
                    now,
                )
                for rank in sorted({*ranks, *before} - {*absent})
            ]
            for call in concurrent.futures.as_completed(calls, LIMIT_S):
                call.result()
        return then

    def _expert_plan(self, before: tuple[Rank, ...], after: tuple[Rank, ...]) -> ExpertChange:
        placement, load = self.hosts[before[0]].core.ask_engine("expert_placement", "expert_load").result(LIMIT_S)
        return plan_change(placement, load, before, after)

    def _handover(self, then: Membership) -> Handover:
        members = {member.engine.rank: member for member in (*self.membership.members, *then.members)}
        everybody = msgspec.structs.replace(then, members=tuple(members[rank] for rank in sorted(members)))
        groups = self.hosts[then.members[0].engine.rank].groups
        return Handover(groups.open_stores_of(everybody, (GroupKind.HANDOVER,)), tuple(sorted(members)))

    def skip_epoch(self) -> None:
        """An epoch that was prepared for and undone is not used again."""
        self.membership = msgspec.structs.replace(self.membership, epoch=Epoch(self.membership.epoch + 1))

    def go(self, then: Membership, *, without: tuple[int, ...] = (), operation: str = "op") -> None:
        """The decision is kept by all, then everyone is told to go."""
        told = [rank for rank in range(len(self.hosts)) if self.threads[rank].is_alive() and rank not in without]
        involved = {member.engine.rank for member in (*self.membership.members, *then.members)}
        for rank in told:
            if rank in involved:
                self.hosts[rank].keep_decision(operation, Term(1), then)
        self.membership = then
        for rank in told:
            self.hosts[rank].set_membership(then)

    def confirmed(self, then: Membership) -> None:
        assert then.group is not None
        for member in then.members:
            self.hosts[member.engine.rank].groups.formed(then.group.stamp).result(LIMIT_S)
        for member in then.members:
            self.hosts[member.engine.rank].reconfigurer.release(then.group.stamp)

    def lockstep(self, rank: int) -> Lockstep:
        found = self.hosts[rank].core.lockstep
        assert found is not None
        return found

    def steps(self) -> list[tuple[int, int]]:
        """Steps and dummy steps of each rank."""
        return [(self.lockstep(r).counters.steps, self.lockstep(r).counters.idle_steps) for r in range(len(self.hosts))]

    def is_resting(self) -> bool:
        return not any(self.lockstep(member.engine.rank).is_stepping for member in self.membership.members)

    def client(self, *ranks: int) -> EngineCoreClient:
        """A client of these ranks, or of all members."""
        members = self.membership.members if not ranks else tuple(self.members[rank] for rank in ranks)
        membership = msgspec.structs.replace(self.membership, members=members)
        access = PoolAccess(membership=membership, engine="echo", timeouts=self.timeouts)
        return EngineCoreClient(access, NoControlPlane(), SocketLinks(access, Limits()), tokenizer=ByteTokenizer())

    def end(self, rank: int) -> None:
        """End a rank at once, as far as the others can tell: its sockets and its group are closed."""
        self.hosts[rank].stop(0)
        self.threads[rank].join(LIMIT_S)
        assert not self.threads[rank].is_alive()

    def close(self) -> None:
        for host in self.hosts:
            host.stop(0)
        for thread in self.threads:
            thread.join(LIMIT_S)
        for host, thread in zip(self.hosts, self.threads, strict=True):
            assert not thread.is_alive(), "a rank does not stop"
            host.close()
        assert not self.raised, self.raised

    def _host(self, rank: int) -> EngineHost:
        spec = EngineSpec(
            pool=self.name,
            rank=rank,
            incarnation=f"i{rank}",
            engine="torch" if self.mixture else "echo",
            model=str(self.mixture) if self.mixture else None,
            data_parallel_size=self.size,
            is_joining=self.mixture is not None and rank >= self.size,
            engine_options=self.options,
            device="cpu",
            tcp="never",
            limits=Limits(),
            timeouts=self.timeouts,
            health=HealthConfig(),
        )
        return EngineHost(spec, node_ip="127.0.0.1")

    def _run(self, host: EngineHost) -> None:
        try:
            host.run()
        except BaseException as error:  # noqa: BLE001 -- the test fails by it when it closes the pool
            self.raised.append(error)


@contextlib.contextmanager
def lockstep_pool(size: int = 3, **settings: Any) -> Iterator[LockstepPool]:
    """A pool whose ranks have met and rest."""
    pool = LockstepPool(size, **settings)
    try:
        pool.decide(*range(size))
        wait_until(lambda: all(pool.lockstep(rank).wave.members for rank in range(size)), "every rank has its group")
        yield pool
    finally:
        pool.close()


@contextlib.asynccontextmanager
async def client_of(pool: LockstepPool, *ranks: int) -> AsyncIterator[EngineCoreClient]:
    """A client whose tables are right when it leaves; then all ranks rest."""
    async with pool.client(*ranks) as client:
        yield client
        client.check_invariants()
    await until(pool.is_resting, "all ranks rest")
