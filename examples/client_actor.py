"""A client as a Ray actor: found by name, streamed through a handle, called like the client: `python examples/client_actor.py`."""

import asyncio

import ray

import raycore


@ray.remote(num_cpus=0)
def elsewhere(handle, prompt: str) -> str:
    """Any task or actor that is given the handle, or finds it by name, is a caller of its own."""
    return "".join(output.text for output in handle.generate(prompt, raycore.SamplingParams(max_tokens=24)))


async def main() -> None:
    async with raycore.launch(pool="handles", engine="echo", data_parallel_size=2):
        handle = raycore.client_actor("handles", "front")
        async for output in handle.generate("Hello through an actor. ", raycore.SamplingParams(max_tokens=48)):
            print(output.text, end="", flush=True)
        print()
        print(await elsewhere.remote(handle, "And from a Ray task too."))
        await handle.operations.pause_scheduler(mode="wait")
        print("paused:", await handle.operations.is_scheduler_paused())
        await handle.operations.resume_scheduler()
        await handle.end()


if __name__ == "__main__":
    asyncio.run(main())
