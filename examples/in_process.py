"""One engine in this process, without Ray, for debugging: `python examples/in_process.py [MODEL]` (no model: the echo engine)."""

import sys

import raycore


def main() -> None:
    engine = {"engine": "torch", "model": sys.argv[1]} if len(sys.argv) > 1 else {"engine": "echo"}
    with raycore.make_client(multiprocess_mode=False, asyncio_mode=False, **engine) as client:
        for output in client.generate("Hello from one process. ", raycore.SamplingParams(max_tokens=48)):
            print(output.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
