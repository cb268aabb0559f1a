"""A routing policy of one's own, and why each request went where it went: `python examples/router.py`."""

import asyncio

import raycore

LONG = 200


class LongPromptsApart:
    """Long prompts go to the last rank, where no short one waits behind them; short ones to where the fewest requests are."""

    def __init__(self) -> None:
        self._looked_at = []

    def choose(self, query, ledgers):
        *others, last = sorted(ledgers, key=lambda ledger: ledger.engine.rank)
        candidates = [last] if query.prefill >= LONG or not others else others
        self._looked_at = [(ledger.estimate(), float(ledger.live), 0) for ledger in candidates]
        return min(candidates, key=lambda ledger: ledger.live)

    def reasons(self):  # optional: what `explain` shows beside the rank
        return self._looked_at


async def main() -> None:
    sampling = raycore.SamplingParams(max_tokens=8)
    async with raycore.launch(engine="echo", data_parallel_size=3, router=LongPromptsApart()) as client:
        prompts = {"a": "short", "b": "short too", "c": "long, " * 50, "d": "short again"}
        streams = [client.generate(prompt, sampling, request_id=name) for name, prompt in prompts.items()]
        await asyncio.gather(*(stream.collect() for stream in streams))
        for name in prompts:
            decision = client.explain(name)
            seen = ", ".join(f"rank {row.rank} had {row.requests}" for row in decision.candidates)
            print(f"{name} went to rank {decision.rank} by {decision.policy}: {seen}")
        async with raycore.connect("default", router="work") as other:  # each client of a pool may have its own
            await other.generate("by the default policy", sampling, request_id="e").collect()
            print(other.explain("e"))


if __name__ == "__main__":
    asyncio.run(main())
