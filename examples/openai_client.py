"""The openai package talks to a pool: `raycore serve` in one terminal, `python examples/openai_client.py [URL]` in another."""

import os
import sys

import openai


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("RAYCORE_API_KEY", "none"))
    model = client.models.list().data[0].id
    question = {"role": "user", "content": "What is the capital of France?"}
    for chunk in client.chat.completions.create(model=model, messages=[question], max_tokens=32, temperature=0, stream=True):
        print(chunk.choices[0].delta.content, end="", flush=True)
    print()
    answers = client.completions.create(model=model, prompt=["The sea is", "The sky is"], max_tokens=8, n=2, seed=1)
    for choice in answers.choices:
        print(f"{choice.index}: {choice.text!r} ({choice.finish_reason})")


if __name__ == "__main__":
    main()
