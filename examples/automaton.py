"""An engine that is no language model: `python examples/automaton.py` runs two on Ray (`docs/engines.md` explains it).

A prompt is a row of cells, 0 and 1; each step is one generation of an elementary cellular automaton, and its cells are the output.
"""

import asyncio

import numpy as np

import raycore
from raycore.engine import EngineInfo, EngineLoad, FinishReason, RequestRefused, StepOutput


class AutomatonEngine:
    """Rule 30, 110, … of Wolfram's numbering, on rows whose ends meet."""

    def __init__(self, rule: int) -> None:
        self.info = EngineInfo("automaton", f"rule {rule}", vocab_size=2, max_model_len=1 << 31, kv_tokens=0, tasks=("generate",))
        self._next = np.array([rule >> neighbours & 1 for neighbours in range(8)], np.uint32)
        self._rows: dict[int, np.ndarray] = {}
        self._left: dict[int, int] = {}

    def add(self, request) -> None:
        row = request.prompt_token_ids
        if len(row) < 3:
            raise RequestRefused("a row has at least 3 cells")
        for _ in range(len(request.delivered) // len(row)):  # a replay: its caller has these generations
            row = self._generation(row)
        self._rows[request.handle], self._left[request.handle] = row, request.sampling.max_tokens - len(request.delivered)

    def abort(self, handles) -> None:
        for handle in handles:
            self._rows.pop(handle, None)

    def step(self) -> StepOutput:
        handles, tokens = list(self._rows), []
        for handle in handles:
            self._rows[handle] = self._generation(self._rows[handle])
            tokens.append(self._rows[handle][: self._left[handle]])
            self._left[handle] -= len(tokens[-1])
        counts = np.array([len(cells) for cells in tokens], np.uint32)
        ends = np.array([handle for handle in handles if not self._left[handle]], np.uint32)
        self.abort(ends.tolist())
        return StepOutput(np.array(handles, np.uint32), np.concatenate(tokens), counts, ends, bytes([FinishReason.LENGTH]) * len(ends))

    def has_work(self) -> bool:
        return bool(self._rows)

    def idle_step(self) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad(running=len(self._rows))

    def utilities(self) -> dict:
        return {}

    def rpc_methods(self) -> dict:
        return {"rule": lambda: self.info.model}

    def budget_s(self, activity) -> None: ...

    def close(self) -> None: ...

    def _generation(self, row):
        return self._next[4 * np.roll(row, 1) + 2 * row + np.roll(row, -1)]


def make_engine(*, options, **_) -> AutomatonEngine:
    return AutomatonEngine(options.get("rule", 30))


async def main() -> None:
    options = {"engine": "automaton:make_engine", "engine_options": {"rule": 90}, "data_parallel_size": 2}
    async with raycore.launch(pool="automata", **options) as client:
        cells = (await client.generate([0] * 20 + [1] + [0] * 20, raycore.SamplingParams(max_tokens=16 * 41)).collect()).token_ids
    print("\n".join("".join(" █"[cell] for cell in cells[start : start + 41]) for start in range(0, 16 * 41, 41)))


if __name__ == "__main__":
    asyncio.run(main())
