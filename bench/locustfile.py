"""What locust's users do to a front: stream completions, one after the other, and check each.

locust -f bench/locustfile.py --headless -u 32 -r 32 -t 30s --host http://127.0.0.1:8000

RAYCORE_MODEL: the model to ask for; RAYCORE_API_KEY: the server's key; RAYCORE_REQUESTS: end after so many, before the time is over. With
the echo engine the text is known, and is checked.
"""

from __future__ import annotations

import json
import os
from typing import Any

import gevent
from locust import FastHttpUser, events, task

MODEL = os.environ.get("RAYCORE_MODEL", "")
TOKENS = 32
PROMPT = "The quick brown fox"
ECHOED = (PROMPT * TOKENS)[:TOKENS]


@events.init.add_listener
def end_after(environment: Any, **_: Any) -> None:
    """With RAYCORE_REQUESTS: end when so many have been answered."""
    left = [int(os.environ.get("RAYCORE_REQUESTS", "0"))]

    def count(**_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            gevent.spawn(environment.runner.quit)  # from a greenlet of its own: a user cannot wait for its own end

    environment.events.request.add_listener(count)


class Reader(FastHttpUser):
    """Reads one stream at a time. The times that locust prints are those to the head of the answer, which comes with its first token."""

    @task
    def stream(self) -> None:
        key = os.environ.get("RAYCORE_API_KEY")
        fields = {"authorization": f"Bearer {key}"} if key else {}
        body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True, **({"model": MODEL} if MODEL else {})}
        with self.client.post("/v1/completions", json=body, headers=fields, stream=True, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            lines = "".join(answer.iter_content()).splitlines()
            text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {"))
            if lines[-2:] != ["data: [DONE]", ""] or (MODEL in {"echo", "scripted"} and text != ECHOED):
                answer.failure(f"wrong answer: {text[:60]!r}, ends with {lines[-2:]}")
            else:
                answer.success()
