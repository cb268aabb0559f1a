"""Two engine cores answer several chats at once, streamed as they come: `python examples/stream.py [MODEL]`."""

import asyncio
import sys

import raycore
from raycore.engines.torch.loading import find_smollm2

QUESTIONS = ["What is the capital of France?", "Name three primary colors.", "Why is the sky blue?"]


async def ask(client, question: str) -> None:
    prompt = client.chat_prompt([{"role": "user", "content": question}])
    async for output in client.generate(prompt, raycore.SamplingParams(max_tokens=40)):
        print(f"[rank {output.rank}] {question} … {client.tokenizer.decode(output.token_ids)!r}")


async def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(find_smollm2())
    async with raycore.launch(pool="stream", engine="torch", model=model, data_parallel_size=2) as client:
        await asyncio.gather(*(ask(client, question) for question in QUESTIONS))


if __name__ == "__main__":
    asyncio.run(main())
