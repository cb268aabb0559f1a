"""An expert-parallel model on one rank and on several: the same answers, the tokens per second, the bytes exchanged.

Each rank is a process with a device of its own; the model has random weights and is written to disk first, since ranks read their shares
of it there, unless `--model` names one. Log probabilities are teacher-forced: those of a prompt's own tokens. No Ray and no ZeroMQ.

    python -m bench.expert_parallel --size 8b --ranks 1 2 --device cuda --json FILE
    python -m bench.expert_parallel --size tiny --ranks 1 2 --device cpu
    raycore make-moe smol-moe && python -m bench.expert_parallel --model smol-moe --ranks 1 2 --device cpu
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from bench.random_moe import VOCABULARY, add_model_arguments, model_of

LIMIT_S = 120.0


def main() -> None:
    """Write the model, run each number of ranks, compare, print, and write."""
    options = _parse()
    with model_of(options) as (target, parameters):
        runs = {ranks: _run(options, target, ranks) for ranks in options.ranks}
    result = {"parameters": parameters, "options": {key: str(value) for key, value in vars(options).items()}, "runs": {}}
    first = runs[options.ranks[0]]
    for ranks, reports in runs.items():
        row = _summary(first, reports)
        result["runs"][ranks] = row
        print(f"{ranks} ranks: {json.dumps(row)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="requests at once, over all ranks")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def _run(options: argparse.Namespace, target: Path, ranks: int) -> list[dict[str, Any]]:
    """Every rank's report, by rank."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, options, str(target), rank, ranks), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        addresses = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(addresses[0])
        reports = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send("end")  # the first rank's stores serve until all are done
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return reports


def _rank(pipe: Any, options: argparse.Namespace, target: str, rank: int, ranks: int) -> None:
    if options.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    import torch

    from raycore import gloo
    from raycore.engines.torch import TorchEngine, TorchEngineOptions

    if options.device == "cpu":
        torch.set_num_threads(1)
    store = gloo.GroupStore("127.0.0.1", limit_s=LIMIT_S)
    pipe.send((store.host, store.port))
    rounds, exchange = _groups(pipe.recv(), rank, ranks, options.device)
    begin_s = time.perf_counter()
    most = max(options.batch)
    engine = TorchEngine.create(
        TorchEngineOptions(
            model=target,
            dtype=options.dtype,
            device=options.device,
            rank=rank,
            data_parallel_size=ranks,
            max_batch_tokens=4096,
            max_sequences=most,
            kv_tokens=(most + 8) * (options.prompt + options.new + 32),
            enable_prefix_caching=False,
        )
    )
    report: dict[str, Any] = {"load_s": time.perf_counter() - begin_s}
    engine.set_group(exchange)
    report["logprobs"] = _forced(engine, rounds, options, rank, ranks)
    for size in options.batch:
        _decode(engine, rounds, options, rank, ranks, size)
        report[f"decode {size}"] = max(_decode(engine, rounds, options, rank, ranks, size) for _ in range(3))
    report["device"] = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    pipe.send(report)
    pipe.recv()
    engine.close()
    for group in (rounds, exchange):
        group.close()
    pipe.close()
    os._exit(0)  # groups end on threads of theirs, which an orderly exit would cut off


def _groups(address: tuple[str, int], rank: int, ranks: int, device: str) -> tuple[Any, Any]:
    """Whether anyone has work is agreed over Gloo; tokens go over NCCL where there are GPUs."""
    from raycore import gloo
    from raycore.groups import GroupKind
    from raycore.ids import Epoch, GroupStamp, Term
    from raycore.membership import GroupAddress

    host, port = address
    at = GroupAddress(GroupStamp(Epoch(1), Term(1)), host, {GroupKind.DP: port, GroupKind.EP: port})
    groups = gloo.form_groups(
        at, rank, ranks, local_host=gloo.LOOPBACK, form_s=LIMIT_S, collective_s=LIMIT_S, device="cpu" if device == "cpu" else "cuda:0"
    )
    return groups[GroupKind.DP], groups[GroupKind.EP]


def _together(engine: Any, rounds: Any, on_output: Any) -> None:
    """Step with the others until nobody has work."""
    import numpy as np

    while True:
        working = np.array([engine.has_work()], np.int64)
        rounds.sum(working)
        if not working[0]:
            return
        if engine.has_work():
            on_output(engine.step())
        else:
            engine.idle_step()


def _requests(engine: Any, options: argparse.Namespace, sampling: Any, rank: int, ranks: int, count: int) -> None:
    """This rank's share of `count` requests, which are the same however many ranks there are."""
    import numpy as np

    from raycore.engine import EngineRequest
    from raycore.ids import Handle, RequestId

    prompts = np.random.default_rng(count).integers(10, VOCABULARY, (count, options.prompt))
    for number in range(rank, count, ranks):
        engine.add(EngineRequest(Handle(number), RequestId(str(number)), prompts[number].astype(np.uint32), sampling))


def _forced(engine: Any, rounds: Any, options: argparse.Namespace, rank: int, ranks: int) -> dict[int, list[float]]:
    """By request: the log probability of each token of its prompt."""
    from raycore.sampling import SamplingParams

    found: dict[int, list[float]] = {}

    def take(output: Any) -> None:
        for part in output.logprobs:
            if part.of_prompt:
                for handle, logprob in zip(part.handles.tolist(), part.logprobs.tolist(), strict=True):
                    found.setdefault(handle, []).append(logprob)

    _requests(engine, options, SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True), rank, ranks, 8)
    _together(engine, rounds, take)
    return found


def _decode(engine: Any, rounds: Any, options: argparse.Namespace, rank: int, ranks: int, size: int) -> float:
    """Output tokens a second of this rank, from the moment all begin to that at which all have ended."""
    import numpy as np

    from raycore.sampling import SamplingParams

    tokens = 0

    def take(output: Any) -> None:
        nonlocal tokens
        tokens += len(output.tokens)

    _requests(engine, options, SamplingParams(max_tokens=options.new, ignore_eos=True), rank, ranks, size)
    rounds.sum(np.ones(1, np.int64))
    begin_s = time.perf_counter()
    _together(engine, rounds, take)
    return tokens / (time.perf_counter() - begin_s)


def _summary(first: list[dict[str, Any]], reports: list[dict[str, Any]]) -> dict[str, Any]:
    expected = {request: row for report in first for request, row in report["logprobs"].items()}
    found = {request: row for report in reports for request, row in report["logprobs"].items()}
    if {request: len(row) for request, row in expected.items()} != {request: len(row) for request, row in found.items()}:
        raise RuntimeError("not the same log probabilities were asked for")
    gaps = [abs(a - b) for request, row in expected.items() for a, b in zip(row, found[request], strict=True)]
    rates = {name: round(sum(report[name] for report in reports), 1) for name in reports[0] if name.startswith("decode")}
    return {
        "device": reports[0]["device"],
        "load_s": round(max(report["load_s"] for report in reports), 1),
        "tokens_per_s": rates,
        "logprobs": len(gaps),
        "mean_gap": sum(gaps) / len(gaps),
        "largest_gap": max(gaps),
    }


if __name__ == "__main__":
    main()
