"""Resizes of an expert-parallel pool on Ray under load: the same answers, nothing lost, the pause at the switch, the copies to joiners.

One rank a device, unless `--ranks-per-gpu` says otherwise. The pool goes through the sizes again and again while streams run without a
break. Proved at each size: the log probabilities of fixed prompts' own tokens (teacher-forced) lie within `--tolerance` of those of the
pool as it was launched; in float32 the greedy text of the load is the same too (`--exact`). Every stream must bring as many tokens as it
was asked for, whatever joined or left. The pause at the commit is the longest gap between two tokens of a stream, beside the median gap of
the same size.

With `--standby K` the pool keeps K warm standbys, as many as join are there before each resize that grows. With `--compare` such resizes
are shown beside those of a pool without, which goes through the sizes once before it: from the call until all members have confirmed.

    python -m bench.elastic_experts --sizes 1 2 1 --resizes 4                                         (CPU, tiny model)
    python -m bench.elastic_experts --sizes 1 2 1 --resizes 4 --standby 1 --warm weights --compare
    python -m bench.elastic_experts --size 8b --dtype bfloat16 --device cuda --sizes 1 2 1 --resizes 50 --json FILE
    python -m bench.elastic_experts --size 8b --dtype bfloat16 --device cuda --sizes 2 4 2 --resizes 50 --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.launch import launch
from bench.random_moe import VOCABULARY, add_model_arguments, model_of
from bench.report import Row, median, publish
from bench.standby import until_warm
from raycore.client.client import EngineCoreClient
from raycore.client.control import ScalingReport
from raycore.sampling import SamplingParams

POOL = "bench-elastic-experts"
FORCED = 4
"""Prompts whose tokens' log probabilities are compared."""
PAUSE_AIM_MS = 30.0
SERVED_S = 2.0
"""How long each size serves before the next resize: medians of gaps are taken over it."""
LIMIT_S = 300.0


@dataclass
class Streams:
    """The load: streams that ask again as soon as they end, and what came of them."""

    client: EngineCoreClient
    prompts: list[np.ndarray]
    new_tokens: int
    times: list[list[float]] = field(default_factory=list)
    """When each stream's tokens came."""
    texts: dict[int, list[int]] = field(default_factory=dict)
    """The first answer to each prompt."""
    answers: int = 0
    short: int = 0
    different: int = 0
    is_over: bool = False

    async def run(self, number: int) -> None:
        times: list[float] = []
        self.times.append(times)
        sampling = SamplingParams(max_tokens=self.new_tokens, ignore_eos=True)
        while not self.is_over:
            tokens: list[int] = []
            async for output in self.client.generate(self.prompts[number], sampling):
                times += [time.perf_counter()] * len(output.token_ids)
                tokens += output.token_ids
            self.answers += 1
            self.short += len(tokens) != self.new_tokens
            self.different += tokens != self.texts.setdefault(number, tokens)

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Between a stream's tokens that came in this time, of all streams."""
        return [b - a for times in self.times for a, b in itertools.pairwise(times) if begin_s <= b and a < end_s]


@dataclass
class Findings:
    """Of all resizes."""

    phases_ms: dict[str, list[float]] = field(default_factory=dict)
    whole_s: dict[str, list[float]] = field(default_factory=dict)
    grown_s: dict[str, list[float]] = field(default_factory=dict)
    """Of resizes that grow: from the call until all members have confirmed."""
    pauses_ms: list[float] = field(default_factory=list)
    """At each commit, above the median gap of the size before."""
    largest_gap: float = 0.0
    weight_bytes: int = 0
    """That joiners took from their peers, experts not counted."""
    weight_bytes_from_disk: int = 0


async def forced(client: EngineCoreClient, prompts: Sequence[np.ndarray]) -> list[float]:
    """The log probability of each token of each prompt but its first."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    outputs = await asyncio.gather(*(client.generate(prompt, sampling).collect() for prompt in prompts))
    return [entry.logprob for output in outputs for entry in output.prompt_logprobs or [] if entry is not None]


async def resize(client: EngineCoreClient, load: Streams, target: int, found: Findings) -> None:
    """One of them: from the call to its answer."""
    before = len(client.ranks())
    begin_s = time.perf_counter()
    usual_s = median(load.gaps_s(begin_s - SERVED_S, begin_s))
    report = await client.scale_elastic_ep(target)
    end_s = time.perf_counter()
    name = f"{before} to {target}"
    found.weight_bytes += report.weight_bytes
    found.weight_bytes_from_disk += report.weight_bytes_from_disk
    for phase, took_s in report.phases_s.items():
        found.phases_ms.setdefault(f"{name}: {phase}", []).append(took_s * 1e3)
    found.whole_s.setdefault(name, []).append(end_s - begin_s)
    decided_s, confirmed_s = _commit(report, end_s)
    if target > before:
        found.grown_s.setdefault(name, []).append(confirmed_s - begin_s)
    found.pauses_ms.append((max(load.gaps_s(decided_s, confirmed_s), default=0.0) - usual_s) * 1e3)


def _commit(report: ScalingReport, end_s: float) -> tuple[float, float]:
    confirmed_s = end_s - report.phases_s.get("retire", 0.0)
    return confirmed_s - report.phases_s["commit"], confirmed_s


async def measure(options: argparse.Namespace, model: str) -> tuple[list[Row], bool]:
    """The whole run; its rows, and whether everything that must hold held."""
    cold, is_cold_right = {}, True
    if options.compare:
        load, found = await _run(options, model, standby=0, resizes=len(options.sizes) - 1)
        cold, is_cold_right = found.grown_s, _is_right(options, load, found)
    until_s = time.monotonic() + options.seconds if options.seconds else math.inf
    load, found = await _run(options, model, standby=options.standby, resizes=options.resizes, until_s=until_s)
    return _rows(options, load, found, cold), is_cold_right and _is_right(options, load, found)


def _is_right(options: argparse.Namespace, load: Streams, found: Findings) -> bool:
    is_right = not load.short and not found.weight_bytes_from_disk and found.largest_gap <= options.tolerance
    return is_right and not (options.exact and load.different)


async def _run(
    options: argparse.Namespace, model: str, *, standby: int, resizes: int, until_s: float = math.inf
) -> tuple[Streams, Findings]:
    """One pool from its launch to its end."""
    random = np.random.default_rng(0)
    prompts = [random.integers(10, VOCABULARY, options.prompt).astype(np.uint32) for _ in range(max(options.streams, FORCED))]
    engine_options: dict[str, Any] = {
        "dtype": options.dtype,
        "kv_tokens": (options.streams + FORCED) * (options.prompt + options.new + 64),
        "max_sequences": options.streams + FORCED,
        **({"threads": 1} if options.device == "cpu" else {}),
    }
    found, sizes = Findings(), itertools.cycle([*options.sizes[1:]])
    async with launch(
        pool=POOL,
        engine="torch",
        model=model,
        device=options.device,
        data_parallel_size=options.sizes[0],
        max_data_parallel_size=max(options.sizes) + standby,
        standby=standby,
        warm=options.warm,
        engine_options=engine_options,
        num_cpus_per_engine=1 if options.device == "cuda" else 0.5,
        resources_per_engine={"GPU": 1 / options.ranks_per_gpu} if options.device == "cuda" else {},
    ) as client:
        reference = await forced(client, prompts[:FORCED])
        load = Streams(client, prompts, options.new)
        tasks = [asyncio.create_task(load.run(number)) for number in range(options.streams)]
        for number, target in enumerate(itertools.islice(sizes, resizes), 1):
            if time.monotonic() > until_s:
                break
            joiners = target - len(client.ranks())
            if joiners > 0:
                await until_warm(POOL, LIMIT_S, count=joiners)
            await asyncio.sleep(SERVED_S)
            await asyncio.wait_for(resize(client, load, target, found), LIMIT_S)
            now = await forced(client, prompts[:FORCED])
            found.largest_gap = max(found.largest_gap, *(abs(a - b) for a, b in zip(reference, now, strict=True)))
            print(f"resize {number} of {resizes}: {target} ranks; {load.answers} answers, gap {found.largest_gap:.3g} nats", flush=True)
        load.is_over = True
        await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)
    return load, found


def _rows(options: argparse.Namespace, load: Streams, found: Findings, cold: Mapping[str, list[float]]) -> list[Row]:
    """`cold`: what growing took without standbys, by resize."""
    tolerance = options.tolerance
    rows = [
        Row("resizes under load", len(found.pauses_ms), ""),
        Row("answers", load.answers, ""),
        Row("answers with a token too few or too many", load.short, "", aim="0", is_met=not load.short),
        Row(
            "answers unlike the prompt's first",
            load.different,
            "",
            aim="0" if options.exact else "",
            is_met=_if(options.exact, load.different == 0),
        ),
        Row("largest gap of a log probability", found.largest_gap, "nats", aim=f"<= {tolerance:g}", is_met=found.largest_gap <= tolerance),
        Row("weights that joiners took from peers, experts not counted", found.weight_bytes / 2**20, "MiB"),
        Row("and from disk", found.weight_bytes_from_disk / 2**20, "MiB", aim="0", is_met=not found.weight_bytes_from_disk),
        _row(
            "pause at the commit above a usual gap, median",
            found.pauses_ms,
            "ms",
            f"<= {PAUSE_AIM_MS:g}",
            median(found.pauses_ms) <= PAUSE_AIM_MS,
        ),
        Row("pause at the commit above a usual gap, longest", max(found.pauses_ms), "ms"),
    ]
    for name, values in found.grown_s.items():
        floor = {"floor": median(cold[name]), "floor_name": "without a standby"} if name in cold else {}
        with_standbys = f" with a standby ({options.warm})" if options.standby else ""
        rows.append(Row(f"{name}{with_standbys}, until all members confirmed", median(values), "s", samples=values, **floor))
    rows += [_row(f"{name}, whole", values, "s") for name, values in found.whole_s.items()]
    return rows + [_row(name, values, "ms") for name, values in found.phases_ms.items()]


def _row(name: str, values: list[float], unit: str, aim: str = "", is_met: bool | None = None) -> Row:
    return Row(name, median(values), unit, aim=aim, is_met=is_met, samples=values)


def _if(wanted: bool, value: bool) -> bool | None:
    return value if wanted else None


def main() -> None:
    """Run and publish; exit with 1 where an answer was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1, 2, 1], help="the size at launch, and those that follow, again and again"
    )
    parser.add_argument("--ranks-per-gpu", type=int, default=1, help="more than 1: they take turns, so times say nothing")
    parser.add_argument("--resizes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no further resize after so many seconds; 0: no limit")
    parser.add_argument("--standby", type=int, default=0, help="warm standbys, which resizes that grow promote; each takes a device")
    parser.add_argument("--compare", action="store_true", help="with --standby: go through the sizes without them first")
    parser.add_argument("--warm", choices=("process", "weights"), default="process", help="how warm: weights holds all but experts too")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=0.0, help="of a log probability; 0: equal to the bit")
    parser.add_argument("--exact", action="store_true", help="the load's greedy text must not change (float32)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.standby and all(after <= before for before, after in itertools.pairwise(options.sizes)):
        parser.error("--standby: no size is larger than the one before it")
    if len(options.sizes) < 2:
        parser.error("--sizes: at least two")
    with model_of(options) as (target, parameters):
        rows, is_right = asyncio.run(measure(options, str(target)))
    device = options.device + (f" ({options.ranks_per_gpu} ranks a GPU)" if options.ranks_per_gpu > 1 else "")
    title = f"Elastic expert parallelism: {parameters / 1e9:.2f} B parameters, {options.dtype}, {device}, sizes {options.sizes}"
    publish(title, rows, options.json)
    raise SystemExit(0 if is_right else 1)


if __name__ == "__main__":
    main()
