"""Two engine cores answer several chats at once, streamed as they come: `python examples/stream.py [MODEL]`."""

import asyncio
import sys

import raycore
from raycore.demo import default_model

QUESTIONS = ["What is the capital of France?", "Name three primary colors.", "Why is the sky blue?"]


async def ask(client, question: str) -> None:
    prompt = client.chat_prompt([{"role": "user", "content": question}])
    async for output in client.generate(prompt, raycore.SamplingParams(max_tokens=40), detokenize=True):
        print(f"[rank {output.rank}] {question} … {output.text!r}")


async def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else default_model()
    options = {"threads": 1}  # of each engine: two cores, two engines
    async with raycore.launch(pool="stream", engine="torch", model=model, data_parallel_size=2, engine_options=options) as client:
        await asyncio.gather(*(ask(client, question) for question in QUESTIONS))


if __name__ == "__main__":
    asyncio.run(main())
