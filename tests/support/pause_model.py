"""Clients, engines and the frames between them as one value, so that every order of events can be searched.

The clients are `PausePlan`s and the engines are `Pause` machines, the real ones; only what carries their messages is a model: a queue each
way per session, in order, which a loss empties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from raycore.client import pause_plan as plans
from raycore.client.pause_plan import Ending, Order, Phase, PlanStep
from raycore.core import pause as machine
from raycore.core.pause import Hold, Pause, PauseState
from raycore.operations import PauseReport

_ORDER_OF = {
    Phase.LOCKING: "prepare",
    Phase.PREPARING: "prepare",
    Phase.DRAINING: "drain",
    Phase.COMMITTING: "commit",
    Phase.RESTORING: "commit",
}


class Faults(NamedTuple):
    """How many of each may still happen."""

    client_deaths: int = 0
    rank_deaths: int = 0
    losses: int = 0
    deadlines: int = 0


class Client(NamedTuple):
    wanted: tuple[str, ...]
    """Operations to begin, one after the other: "keep", "wait", "abort", "resume"."""
    plan: plans.PausePlan | None = None
    mode: str = ""
    number: int = 0
    endings: tuple[Ending, ...] = ()
    is_alive: bool = True


class Engine(NamedTuple):
    pause: Pause = Pause()
    has_work: bool = True
    is_alive: bool = True


class World(NamedTuple):
    clients: tuple[Client, ...]
    engines: tuple[Engine, ...]
    up: tuple[tuple[Any, ...], ...]
    """By client * ranks + rank: (operation, order), or "end" where a session ended."""
    down: tuple[tuple[Any, ...], ...]
    """(operation, report), (operation, "lost"), or "gone"."""
    faults: Faults


def world(wanted: list[tuple[str, ...]], ranks: int, *, has_work: bool = True, **faults: int) -> World:
    empty = ((),) * (len(wanted) * ranks)
    return World(tuple(map(Client, wanted)), (Engine(has_work=has_work),) * ranks, empty, empty, Faults(**faults))


def successors(w: World) -> Iterator[tuple[str, World]]:
    """Everything that may happen next."""
    for c, client in enumerate(w.clients):
        if client.is_alive:
            yield from _of_client(w, c, client)
    for r, engine in enumerate(w.engines):
        if engine.is_alive:
            yield from _of_engine(w, r, engine)


def _of_client(w: World, c: int, client: Client) -> Iterator[tuple[str, World]]:
    ranks = len(w.engines)
    plan = client.plan
    is_free = plan is None or plan.phase is Phase.ENDED
    live = tuple(r for r in range(ranks) if w.engines[r].is_alive and "gone" not in w.down[c * ranks + r])
    if is_free and client.wanted and live:
        yield f"client {c} begins {client.wanted[0]}", _begin(w, c, live)
    for r in range(ranks):
        if w.down[c * ranks + r]:
            yield f"client {c} hears rank {r}", _hear(w, c, r)
    if w.faults.deadlines and plan is not None and plan.phase not in (Phase.ENDED, Phase.RESTORING):
        spent = w._replace(faults=w.faults._replace(deadlines=w.faults.deadlines - 1))
        yield f"the deadline of client {c}", _apply(spent, c, plans.on_expired(plan))
    if w.faults.client_deaths:
        yield f"client {c} dies", _client_dies(w, c, is_delivered=True)
        yield f"client {c} dies, and what it sent is lost", _client_dies(w, c, is_delivered=False)


def _of_engine(w: World, r: int, engine: Engine) -> Iterator[tuple[str, World]]:
    ranks = len(w.engines)
    if engine.has_work and engine.pause.state is not PauseState.PAUSED:
        yield f"rank {r} has no work left", _settle(w, r, engine._replace(has_work=False), machine.on_idle(engine.pause))
    for c in range(len(w.clients)):
        if w.up[c * ranks + r]:
            yield f"rank {r} hears client {c}", _take(w, c, r)
    if w.faults.rank_deaths and any(other.is_alive for o, other in enumerate(w.engines) if o != r):
        yield f"rank {r} dies", _rank_dies(w, r)
    for c in range(len(w.clients) if w.faults.losses else 0):
        if w.clients[c].is_alive:
            yield f"the session of client {c} with rank {r} is lost", _lose(w, c, r)


def heal(w: World) -> World:
    """What any client does that sees ranks with different stamps."""
    highest = max(engine.pause.stamp for engine in w.engines if engine.is_alive)
    for r, engine in enumerate(w.engines):
        if engine.is_alive and engine.pause.stamp < highest:
            step = machine.on_commit(engine.pause, "heal", highest, abort=False)
            assert not step.is_refused
            w = _settle(w, r, engine, step)
    return w


def _begin(w: World, c: int, ranks: tuple[int, ...]) -> World:
    client = w.clients[c]
    mode, *rest = client.wanted
    step = plans.begin(ranks, is_pause=mode != "resume", is_waiting=mode == "wait")
    w = _with_client(w, c, client._replace(wanted=tuple(rest), plan=step.plan, mode=mode, number=client.number + 1))
    return _apply(w, c, step)


def _apply(w: World, c: int, step: PlanStep) -> World:
    client = w.clients[c]
    operation, ranks, up = f"{c}.{client.number}", len(w.engines), list(w.up)
    endings = client.endings if step.ending is None else (*client.endings, step.ending)
    if step.ending is Ending.DONE:
        late = [r for r in step.plan.asked if w.engines[r].is_alive and w.engines[r].pause.stamp < step.plan.stamp]
        assert not late, f"done, but ranks {late} have not carried it out"
    for order in step.orders:
        up[c * ranks + order.rank] += ((operation, client.mode, msgspec.structs.replace(order, is_repeat=False)),)
    return _with_client(w, c, client._replace(plan=step.plan, endings=endings))._replace(up=tuple(up))


def _hear(w: World, c: int, r: int) -> World:
    at = c * len(w.engines) + r
    news, *rest = w.down[at]
    w = w._replace(down=_set(w.down, at, tuple(rest)))
    client = w.clients[c]
    plan = client.plan
    if plan is None or plan.phase is Phase.ENDED:
        return w
    if news == "gone":
        return _apply(w, c, plans.on_gone(plan, r))
    operation, phase, report = news
    if operation != f"{c}.{client.number}" or phase != _ORDER_OF[plan.phase]:
        return w
    return _apply(w, c, plans.on_failed(plan, r) if report == "lost" else plans.on_report(plan, r, report))


def _take(w: World, c: int, r: int) -> World:
    """A rank takes in one message."""
    ranks, engine = len(w.engines), w.engines[r]
    at = c * ranks + r
    message, *rest = w.up[at]
    w = w._replace(up=_set(w.up, at, tuple(rest)))
    pause = engine.pause
    if message == "end":
        return _settle(w, r, engine, machine.on_owner_gone(pause, c))
    operation, mode, order = message
    match order.phase:
        case "prepare":
            hold = Hold(operation, c, f"client {c}", PauseState.RUNNING)
            step = machine.on_prepare(pause, hold, None if mode == "resume" else mode)
        case "drain":
            step = machine.on_drain(pause, operation, (c, operation), has_work=engine.has_work)
        case "undo":
            return _settle(w, r, engine, machine.on_undo(pause, operation))
        case _:
            step = machine.on_commit(pause, operation, order.stamp, abort=mode == "abort" and bool(order.stamp & 1))
            is_early = pause.state is PauseState.PAUSING and engine.has_work
            assert not (is_early and step.pause.state is PauseState.PAUSED), "paused before what runs had ended"
    w = _settle(w, r, engine, step)
    return w if step.is_deferred else _answer(w, c, r, operation, order, is_granted=not step.is_refused)


def _settle(w: World, r: int, engine: Engine, step: machine.PauseStep) -> World:
    """Carry out what a rank's machine decided."""
    was_paused = engine.pause.state is PauseState.PAUSED
    assert not (was_paused and step.pause.state is PauseState.PAUSING)
    assert step.release_held == (step.pause.state is PauseState.RUNNING and engine.pause.state is not PauseState.RUNNING)
    w = w._replace(engines=_set(w.engines, r, engine._replace(pause=step.pause, has_work=engine.has_work and not step.abort_running)))
    for c, operation in step.completed:
        w = _answer(w, c, r, operation, Order(r, "drain"), is_granted=True)
    return w


def _answer(w: World, c: int, r: int, operation: str, order: Order, *, is_granted: bool) -> World:
    if not w.clients[c].is_alive:
        return w
    pause = w.engines[r].pause
    report = PauseReport(is_granted, False, pause.stamp, is_draining=machine.is_draining(pause))
    at = c * len(w.engines) + r
    return w._replace(down=_set(w.down, at, (*w.down[at], (operation, order.phase, report))))


def _client_dies(w: World, c: int, *, is_delivered: bool) -> World:
    ranks = len(w.engines)
    for at in range(c * ranks, (c + 1) * ranks):
        kept = w.up[at] if is_delivered else tuple(m for m in w.up[at] if m == "end")
        w = w._replace(up=_set(w.up, at, (*kept, "end")), down=_set(w.down, at, ()))
    faults = w.faults._replace(client_deaths=w.faults.client_deaths - 1)
    return _with_client(w, c, w.clients[c]._replace(is_alive=False, plan=None, wanted=()))._replace(faults=faults)


def _rank_dies(w: World, r: int) -> World:
    ranks = len(w.engines)
    w = w._replace(engines=_set(w.engines, r, w.engines[r]._replace(is_alive=False, pause=Pause())))
    for c, client in enumerate(w.clients):
        at = c * ranks + r
        w = w._replace(up=_set(w.up, at, ()), down=_set(w.down, at, ("gone",) if client.is_alive else ()))
    return w._replace(faults=w.faults._replace(rank_deaths=w.faults.rank_deaths - 1))


def _lose(w: World, c: int, r: int) -> World:
    """Frames on the way are gone, the old session ends at the rank before the new one says anything."""
    at, client = c * len(w.engines) + r, w.clients[c]
    plan = client.plan
    waits = plan is not None and plan.phase is not Phase.ENDED and r in plan.pending
    news = ((f"{c}.{client.number}", _ORDER_OF[plan.phase], "lost"),) if waits and plan is not None else ()
    gone = ("gone",) if "gone" in w.down[at] else ()
    w = w._replace(up=_set(w.up, at, ("end",)), down=_set(w.down, at, gone or news))
    return w._replace(faults=w.faults._replace(losses=w.faults.losses - 1))


def _with_client(w: World, c: int, client: Client) -> World:
    return w._replace(clients=_set(w.clients, c, client))


def _set(row: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*row[:at], value, *row[at + 1 :])
