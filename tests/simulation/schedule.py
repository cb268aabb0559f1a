"""One seeded schedule: a pool, load, an operation, what goes wrong in it; then everything must be settled and the next operation work."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from dataclasses import dataclass

import msgspec

from actors.setup import PoolSetup
from elastic.operation import Phase
from raycore.errors import RaycoreError
from raycore.membership import Membership
from tests.simulation.virtual_loop import StalledError
from tests.simulation.world import Controller, ViolatedError, World

FAULTS = ("crash", "crash", "freeze", "hang", "controller", "controller", "cancel")
PHASES = (*(phase for phase in Phase if not phase.is_end), Phase.SPAWN, Phase.PREPARE, Phase.COMMIT)
"""Where faults of a phase strike; three of them more often, for most is under way there."""
_FAULTS_OF_A_PHASE = 0.5
_EXPERT_PARALLEL = 0.2
"""Of all pools."""
_AT_THE_SWITCH = 0.6
"""Of those have nothing but the loss of a joiner around the switch, after which there may be a way back."""
_SETTLED_S = 300.0
_LOOK_S = 0.25
_CANCELS = 8
"""Some work is finished, not broken off, and then something else begins."""


@dataclass(frozen=True)
class Outcome:
    """What a schedule came to. `digest`: of everything that happened, in order."""

    seed: int
    problems: tuple[str, ...]
    digest: str
    hops: int
    story: tuple[str, ...]


def run(seed: int) -> Outcome:
    """Run a schedule; the same seed is the same run."""
    rng = random.Random(f"schedule {seed}")
    faults = {rng.randrange(1, 140): rng.choice(FAULTS) for _ in range(rng.choice((0, 1, 1, 1, 2, 2)))}
    sync_interval = rng.choice((0, 1, 1, 1, 2))
    experts = random.Random(f"experts {seed}")
    is_expert_parallel = experts.random() < _EXPERT_PARALLEL
    if is_expert_parallel:
        sync_interval = max(1, sync_interval)
        faults = faults if experts.random() > _AT_THE_SWITCH else {}
    world = World(seed, sync_interval=sync_interval, faults={}, is_expert_parallel=is_expert_parallel)
    logging.disable(logging.CRITICAL)
    problems: list[str] = []
    try:
        with world.surroundings():
            world.loop.run_until_complete(asyncio.wait_for(_schedule(world, rng, faults), 3600.0))
    except (ViolatedError, StalledError, TimeoutError, RaycoreError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    problems = [*world.violations, *problems]
    digest = hashlib.sha256("\n".join(world.trace).encode()).hexdigest()[:16]
    outcome = Outcome(seed, tuple(problems), digest, world.hops, tuple(world.trace))
    with world.surroundings():
        _end(world)
    logging.disable(logging.NOTSET)
    return outcome


def _end(world: World) -> None:
    """Whatever waits still is cancelled while the loop is there."""
    world.is_calm = True
    for found in world.alive():
        found.is_alive = False
    world.loop.set_exception_handler(lambda _loop, _context: None)
    for _ in range(_CANCELS):
        tasks = asyncio.all_tasks(world.loop)
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        world.loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
    world.loop.close()


async def _schedule(world: World, rng: random.Random, faults: dict[int, str]) -> None:
    controller = world.controller = Controller(world)
    size = world.size = rng.randrange(1, 4)
    controller.pool._setup = _sized(controller, size)
    world.is_calm = True
    await controller.pool.start()
    controller.is_known = True
    world.is_calm, world.hops, world.faults = False, 0, faults
    if world.is_expert_parallel and not faults:
        world.at_phase = {
            Phase.COMMIT: (
                rng.choice(("crash", "crash", "hang", "freeze", "controller")),
                "joiner",
                rng.uniform(0.0, rng.choice((0.03, 0.3))),
            )
        }
    elif rng.random() < _FAULTS_OF_A_PHASE:
        after_s = rng.uniform(0.0, rng.choice((0.005, 0.25)))
        world.at_phase = {rng.choice(PHASES): (rng.choice(FAULTS), rng.choice(("joiner", "member", "leaver")), after_s)}
    load = world.spawn(_load(world, rng.randrange(4, 12)))
    await world.sleep(rng.uniform(0.0, 0.05))
    world.spawn(_operate(world, rng, size))
    if rng.random() < 0.2:
        await world.sleep(rng.uniform(0.0, 0.5))
        world.spawn(_operate(world, rng, size))
    await load
    await world.sleep(0.5)
    await _settled(world, "after the operation")
    world.is_calm = True
    if not world.is_over():
        await _next_one(world, rng)


async def _load(world: World, requests: int) -> None:
    for _ in range(requests):
        world.client.ask(world.random.randrange(3, 60), _newest(world))
        await world.sleep(world.random.expovariate(1 / 0.04))


def _newest(world: World) -> Membership:
    assert world.controller is not None
    return world.controller.pool.membership


def _sized(controller: Controller, size: int) -> PoolSetup:
    setup = controller.pool._setup
    return msgspec.structs.replace(setup, config=setup.config.model_copy(update={"data_parallel_size": size}))


async def _operate(world: World, rng: random.Random, size: int) -> None:
    """What a user does; errors are the user's to read."""
    assert world.controller is not None
    while not world.controller.is_known:  # what the controller actor's calls wait for
        await world.sleep(0.1)
    scaler = world.controller.pool.scaler
    choice = rng.random() if size > 1 and Phase.COMMIT not in world.at_phase else 1.0
    try:
        if choice < 0.25:
            await scaler.remove([rng.randrange(size)])
        elif choice < 0.4:  # a node goes, with one rank or with all
            engines = [member.engine for member in world.controller.pool.membership.members]
            await scaler.evacuate(engines[: rng.choice((1, len(engines)))])
        else:
            least = size if world.is_expert_parallel and Phase.COMMIT in world.at_phase else 1
            await scaler.scale(rng.choice([target for target in (1, 2, 3, 4) if target != size and target >= least]))
    except RaycoreError as error:
        world.note(f"the operation ended: {error}")
    else:
        world.note("the operation is done")


async def _settled(world: World, when: str) -> None:
    until_s = world.loop.time() + _SETTLED_S
    while problem := world.unsettled():
        if world.loop.time() > until_s:
            raise ViolatedError(f"{when}: {problem}")
        await world.sleep(_LOOK_S)


async def _next_one(world: World, rng: random.Random) -> None:
    """The next operation works, and what it leaves is right too."""
    assert world.controller is not None
    pool = world.controller.pool
    size = len(pool.membership.members)
    target = rng.choice([other for other in (1, 2, 3) if other != size])
    for _ in range(3):
        world.client.ask(20, pool.membership)
    report = await pool.scaler.scale(target)
    world.check(len(report.ranks) == target, f"the next operation to {target} left {report.ranks}")
    await _settled(world, "after the next operation")
