"""Two engine cores share the experts of one model: `raycore make-moe smol-moe`, then `python examples/experts.py smol-moe`."""

import asyncio
import sys

import raycore
from elastic.rebalance import rebalance

PROMPTS = ["The capital of France is", "Three primary colors are", "Bees make", "A week has"]


async def main(model: str) -> None:
    options = {"threads": 1}  # of each engine: two cores, two engines
    async with raycore.launch(pool="experts", model=model, data_parallel_size=2, engine_options=options) as client:
        sampling = raycore.SamplingParams(max_tokens=16)
        outputs = await asyncio.gather(*(client.generate(prompt, sampling, detokenize=True).collect() for prompt in PROMPTS))
        for output in outputs:
            print(f"[rank {output.rank}] {output.text!r}")
        load = await client.call_all("collective_rpc", method="expert_load")
        for rank, layers in load.items():
            print(f"tokens of rank {rank} by expert of the first layer: {layers[min(layers, key=int)]}")
        report = await rebalance(client, wait_s=60)
        print(f"{report.moves} experts moved, and the busiest rank has {report.after:.2f} times the mean instead of {report.before:.2f}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
