"""POST /v1/embeddings, where the pool's model embeds."""

from __future__ import annotations

import base64

from raycore.engine import EMBED
from raycore.http.endpoint import Asked, Reply
from raycore.http.errors import bad_value
from raycore.http.front import Front
from raycore.http.protocol import EmbeddingBody, parse
from raycore.http.replies import encode


class Embeddings:
    """The route's handler."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, asked: Asked) -> Reply:
        """Answer a request. Vectors are float32: as numbers, or as base64 of their little-endian bytes, which OpenAI's client asks for."""
        front, ask = self._front, parse(EmbeddingBody, asked.body)
        front.check_model(ask.model)
        tasks = front.client.info.tasks
        if EMBED not in tasks:
            raise bad_value(f"this model supports {', '.join(tasks)}, not {EMBED}", "model", "not_supported")
        prompts = await front.prompts(ask.input, "input")
        vectors = await front.client.embed(prompts, priority=ask.priority or 0)
        if ask.dimensions not in {None, vectors.shape[1]}:
            raise bad_value(f"this model's vectors have {vectors.shape[1]} dimensions, not {ask.dimensions}", "dimensions", "not_supported")
        as_bytes = ask.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_bytes else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        tokens = sum(map(len, prompts))
        front.metrics.count_tokens(tokens, 0)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Reply(encode({"object": "list", "data": data, "model": front.model, "usage": usage}))
