"""The simulator behind the routing figures: it loses nothing, steps as the echo engine does, and a seed is all its chance."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import route_sim
from bench.simulation.engine import SimEngine, SimRequest, StepModel
from bench.simulation.fleet import LINK_S, FleetSimulation, Setup
from bench.simulation.study import draws, shifted, simulate
from bench.simulation.summary import over_seeds, summarise
from raycore.engine import EMPTY, EngineRequest
from raycore.engines.echo import EchoEngine, EchoOptions
from raycore.ids import Handle, RequestId
from raycore.routing.selection import make_router
from raycore.sampling import SamplingParams
from raycore.traces import TraceRequest, load_trace

SMALL = StepModel(max_batch_tokens=512, max_sequences=16, kv_tokens=12_000)
"""Chunks prompts, fills its batch and its cache."""
SETUPS = {
    "one router": Setup(engines=3),
    "many routers, old reports": Setup(engines=3, routers=4, report_s=1.0),
    "two speeds": Setup(engines=3, slowness=(2.0,)),
    "lockstep": Setup(engines=3, is_lockstep=True, routers=2),
    "a cache that overflows": Setup(engines=3, model=SMALL),
    "prefix caches": Setup(engines=3, model=replace(SMALL, cache_blocks=8)),
}


LONGEST = 3000


def conversation(seed: int, requests: int = 200, *, scale: float = 4.0) -> list[TraceRequest]:
    """A synthetic trace of prompts that fit `SMALL`, in which every third prompt begins as one of five."""
    rows = (
        row._replace(prompt_tokens=min(row.prompt_tokens, LONGEST))
        for row in load_trace(None, rate_scale=scale, seed=seed, requests=requests)
    )
    return [row._replace(blocks=(n // 3 % 5, 100 + n)) if n % 3 == 0 else row for n, row in enumerate(rows)]


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("policy", ["work", "prefix", "reference", "random"])
def test_every_request_is_served_once_and_nothing_is_left(name: str, policy: str) -> None:
    trace, setup = conversation(1), SETUPS[name]
    requests = [SimRequest.of(index, row) for index, row in enumerate(trace)]
    simulation = FleetSimulation(requests, setup, lambda chance, clock: make_router(policy, randomness=chance, clock=clock))
    outcome = simulation.run()
    for request in outcome.requests:
        assert 0 <= request.engine < setup.engines
        assert request.arrival_s + 2 * LINK_S < request.first_token_s <= request.end_s
    computed = sum(tokens for *_, tokens in outcome.steps)
    asked = sum(row.prompt_tokens + row.output_tokens for row in trace)
    hits = sum(request.hit_tokens for request in outcome.requests)
    preempted = sum(engine.preempted for engine in outcome.engines)
    assert computed > asked - hits if preempted else computed == asked - hits, "what is preempted is computed again, and nothing else"
    assert (preempted > 0) == (setup.model.kv_tokens == SMALL.kv_tokens), "only a cache that overflows does that"
    assert (hits > 0) == bool(setup.model.cache_blocks)
    for engine in outcome.engines:
        assert (engine.kv_used, engine.queued_tokens, engine.has_work) == (0, 0, False)
    for router in simulation.routers:
        router.hear_until(outcome.end_s + 1.0)
        assert [(ledger.requests, ledger.prefill) for ledger in router.ledgers] == [(0, 0)] * setup.engines


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_steps_exactly_as_the_echo_engine_does(seed: int) -> None:
    """The same requests at the same steps: the same batches, loads and step times, through chunked prompts and preemptions."""
    slept: list[float] = []
    options = {name: getattr(SMALL, name) for name in ("base_s", "per_sequence_s", "per_kv_token_s", "per_prefill_token_s")}
    limits = {name: getattr(SMALL, name) for name in ("max_batch_tokens", "max_sequences", "kv_tokens")}
    echo = EchoEngine(EchoOptions(**options, **limits), clock=lambda: 0.0, sleep=slept.append)
    model = SimEngine(SMALL)
    chance = np.random.default_rng(seed)
    left = [SimRequest(n, 0.0, int(chance.integers(1, 3000)), int(chance.integers(1, 400))) for n in range(120)]
    ended = 0
    while left or model.has_work:
        for request in left[: chance.integers(0, 3)]:
            left.remove(request)
            model.add(request)
            prompt = np.ones(request.prompt_tokens, dtype=np.uint32)
            sampling = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True)
            echo.add(EngineRequest(Handle(request.index), RequestId(str(request.index)), prompt, sampling, delivered=EMPTY))
        assert echo.has_work() == model.has_work
        if not model.has_work:
            continue
        seconds = model.begin_step()
        output = echo.step()
        result = model.end_step()
        assert slept.pop() == pytest.approx(seconds)
        assert output.prefilled == model.prefilled
        assert sorted(output.finished.tolist()) == sorted(request.index for request in result.ends)
        assert echo.load() == model.load()
        ended += len(result.ends)
    assert ended == 120
    assert model.preempted == echo.stats()["preempted"] > 0


def test_a_request_alone_takes_what_the_model_says() -> None:
    prompt, output = 1000, 50
    (request,) = simulate("work", [TraceRequest(1.0, prompt, output)], Setup(engines=2)).requests
    model = StepModel()
    steps = [
        model.base_s
        + model.per_sequence_s
        + model.per_kv_token_s * (prompt + 1 + n)
        + (model.per_prefill_token_s * prompt if n == 0 else 0)
        for n in range(output)
    ]
    assert request.first_token_s == pytest.approx(1.0 + LINK_S + steps[0] + LINK_S)
    assert request.end_s == pytest.approx(1.0 + LINK_S + sum(steps) + LINK_S)


def test_a_seed_decides_everything_and_another_one_decides_otherwise() -> None:
    def summary(seed: int) -> object:
        return summarise(simulate("two-choices", conversation(2), Setup(engines=4, routers=3, seed=seed)))

    assert summary(0) == summary(0)
    assert summary(0) != summary(1)


def test_shifted_traces_have_the_same_requests_close_to_where_they_were() -> None:
    trace = [row._replace(blocks=(n,)) for n, row in enumerate(load_trace(None, seed=3, requests=200))]
    moved = shifted(trace, 1)
    assert moved == shifted(trace, 1) != shifted(trace, 2)
    assert [row.arrival_s for row in moved] == sorted(row.arrival_s for row in moved)
    reach_s = 8 * (trace[-1].arrival_s - trace[0].arrival_s) / 200
    assert all(abs(trace[row.blocks[0]].arrival_s - row.arrival_s) <= reach_s for row in moved)
    assert sorted(row.blocks[0] for row in moved) == list(range(200))
    first, second = draws(None, 2.0, 2, requests=50)
    assert first == load_trace(None, rate_scale=2.0, seed=0, requests=50)
    assert second != first


def test_a_known_prefix_is_found_again_by_the_policy_that_looks_for_it() -> None:
    """Forty conversations of six blocks, of which an engine's cache keeps ten."""
    rows = load_trace(None, rate_scale=2.0, seed=5, requests=400)
    trace = [row._replace(prompt_tokens=3500, blocks=tuple(range(n % 40 * 6, n % 40 * 6 + 6))) for n, row in enumerate(rows)]
    setup = Setup(engines=4, model=StepModel(cache_blocks=60))
    rows_of = {policy: summarise(simulate(policy, trace, setup)) for policy in ("work", "prefix")}
    assert rows_of["prefix"].prefix_hits > 2 * rows_of["work"].prefix_hits
    spread = over_seeds(list(rows_of.values()))["prefix_hits"]
    assert (spread["min"], spread["max"]) == (rows_of["work"].prefix_hits, rows_of["prefix"].prefix_hits)


def test_the_command_line_prints_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    command = "route_sim --policies work reference --engines 2 --requests 100 --seeds 2 --rates 1 2 --slowness 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--json", str(out), "--plots", str(tmp_path)])
    route_sim.main()
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["rates"] == [1.0, 2.0]
    assert [set(rows) for rows in written["results"]] == [{"work", "reference"}] * 2
    row = written["results"][1]["work"]["ttft_p99_s"]
    assert 0 < row["min"] <= row["median"] <= row["max"]
    for name in ("waits.png", "balance.png", "rates.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line].count("work") == 2


@pytest.mark.parametrize("wrong", ["--slowness 0", "--slowness 2 2 2", "--routers 0", "--rate-scale 0", "--trace nowhere.csv"])
def test_the_command_line_refuses_what_cannot_be(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["route_sim", "--engines", "2", "--requests", "5", *wrong.split()])
    with pytest.raises(SystemExit, match=wrong.split()[1] if "trace" in wrong else "above 0|at least 1|at most 2"):
        route_sim.main()
