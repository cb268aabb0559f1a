"""The events of a pool's life as its controller writes them: one JSON object a line, readable long after the pool is gone. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import msgspec

from raycore.membership import Membership, MemberState

DEATH_KINDS = (
    ("hung", "hang"),
    ("step loop failed", "engine"),
    ("step loop ended", "engine"),
    ("constructor failed", "engine"),
    ("memory monitor", "memory"),
    ("node died", "node"),
    ("killed through ray", "killed"),
    ("process", "process"),
    ("new groups", "groups"),
)
"""What a cause contains, and the kind that metrics count it by; the first match wins."""
LOST_WITH_ANOTHER, OTHER = "other_rank", "other"


class PoolEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """What every line has. `at_s`: Unix time. `life`: differs between two pools of one name, and stays when a controller is restarted."""

    at_s: float
    pool: str
    life: str


class Began(PoolEvent, frozen=True, tag="began"):
    """A controller has the pool up; `recovered`: it found the pool running and adopted its engines."""

    engine: str
    model: str
    term: int
    recovered: bool = False


class EpochBegan(PoolEvent, frozen=True, tag="epoch"):
    """A decision about the members; `ranks`: those that serve."""

    epoch: int
    term: int
    ranks: tuple[int, ...]
    leaving: tuple[int, ...] = ()


class Joined(PoolEvent, frozen=True, tag="joined"):
    """A rank became a member."""

    rank: int
    incarnation: str
    node_ip: str = ""


class Left(PoolEvent, frozen=True, tag="left"):
    """A rank is no member any more, by the pool's choice."""

    rank: int
    incarnation: str


class Died(PoolEvent, frozen=True, tag="died"):
    """A rank was lost. `kind`: the cause as metrics count it."""

    rank: int
    incarnation: str
    cause: str
    kind: str


class PhaseBegan(PoolEvent, frozen=True, tag="phase"):
    """A scaling operation entered a phase; "done" and "undone" are its ends."""

    operation: str
    phase: str
    target: int
    joining: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()
    error: str = ""


class RankState(PoolEvent, frozen=True, tag="state"):
    """A rank was paused or put to sleep, or goes on."""

    rank: int
    is_paused: bool
    is_sleeping: bool


class LoadSeen(PoolEvent, frozen=True, tag="load"):
    """Requests of each rank as it said last: running, waiting, and the share of its cache that is in use."""

    ranks: dict[int, tuple[int, int, float]]


class Ended(PoolEvent, frozen=True, tag="ended"):
    """The pool was taken down."""


Event = Began | EpochBegan | Joined | Left | Died | PhaseBegan | RankState | LoadSeen | Ended

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode(event: Event) -> bytes:
    """One line, with its end."""
    return _encoder.encode(event) + b"\n"


def decode_lines(lines: Iterable[bytes]) -> Iterator[Event]:
    """The events of a log; a line that is torn, or of a later version, is passed over."""
    for line in lines:
        try:
            yield _decoder.decode(line)
        except (msgspec.DecodeError, msgspec.ValidationError):
            continue


def kind_of(cause: str) -> str:
    """A cause of death as one of few words."""
    lowered = cause.lower()
    return next((kind for needle, kind in DEATH_KINDS if needle in lowered), OTHER)


class Stamp(msgspec.Struct, frozen=True):
    """What an event is stamped with beside its time."""

    pool: str
    life: str


def membership_events(before: Membership, after: Membership, at_s: float, stamp: Stamp, ips: dict[int, str]) -> list[Event]:
    """Who joined, left and died between two decisions, and the new epoch. `ips`: of joiners, by rank."""
    pool, life = stamp.pool, stamp.life
    known = {departure.engine for departure in before.departed}
    events: list[Event] = []
    for lost in after.departed:
        if lost.engine not in known:
            engine = lost.engine
            kind = kind_of(lost.cause) if lost.lost_with is None else LOST_WITH_ANOTHER
            events.append(
                Died(at_s=at_s, pool=pool, life=life, rank=engine.rank, incarnation=engine.incarnation, cause=lost.cause, kind=kind)
            )
    departed = {departure.engine for departure in after.departed}
    for member in before.members:
        if not after.has(member.engine) and member.engine not in departed:
            events.append(Left(at_s=at_s, pool=pool, life=life, rank=member.engine.rank, incarnation=member.engine.incarnation))
    for member in after.members:
        if not before.has(member.engine):
            rank = member.engine.rank
            ip = ips.get(rank, "")
            events.append(Joined(at_s=at_s, pool=pool, life=life, rank=rank, incarnation=member.engine.incarnation, node_ip=ip))
    if (before.epoch, before.term) != (after.epoch, after.term):
        serving = tuple(member.engine.rank for member in after.members if member.state is MemberState.SERVING)
        leaving = tuple(member.engine.rank for member in after.members if member.state is not MemberState.SERVING)
        events.append(EpochBegan(at_s=at_s, pool=pool, life=life, epoch=after.epoch, term=after.term, ranks=serving, leaving=leaving))
    return events


def describe(event: Event) -> str:  # noqa: PLR0911 -- one line for each kind
    """The event as a line for people, without its time."""
    match event:
        case Began():
            how = "a new controller adopted the pool" if event.recovered else "the pool is up"
            return f"{how}: engine {event.engine}, model {event.model}, term {event.term}"
        case EpochBegan():
            leaving = f"; leaving: {_ranks(event.leaving)}" if event.leaving else ""
            return f"epoch {event.epoch} (term {event.term}): ranks {_ranks(event.ranks)} serve{leaving}"
        case Joined():
            return f"rank {event.rank} ({event.incarnation}) joined" + (f" on {event.node_ip}" if event.node_ip else "")
        case Left():
            return f"rank {event.rank} ({event.incarnation}) left"
        case Died():
            return f"rank {event.rank} ({event.incarnation}) died [{event.kind}]: {event.cause}"
        case PhaseBegan():
            change = [f"{what} {_ranks(ranks)}" for what, ranks in (("joining", event.joining), ("leaving", event.leaving)) if ranks]
            error = f": {event.error}" if event.error else ""
            return f"operation {event.operation} to {event.target} ranks ({'; '.join(change)}): {event.phase}{error}"
        case RankState():
            what = [word for word, is_so in (("paused", event.is_paused), ("asleep", event.is_sleeping)) if is_so]
            return f"rank {event.rank} is {' and '.join(what)}" if what else f"rank {event.rank} goes on"
        case LoadSeen():
            loads = (f"{rank}: {running} run, {waiting} wait, cache {kv:.0%}" for rank, (running, waiting, kv) in event.ranks.items())
            return "load of rank " + "; ".join(loads)
        case Ended():
            return "the pool has ended"


def line_for_people(event: Event) -> str:
    """The event with its time of day."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at_s))
    return f"{clock}.{int(event.at_s % 1 * 1000):03d} {event.pool} {describe(event)}"


def _ranks(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks)) or "none"
