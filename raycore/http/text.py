"""Text to tokens and back for the routes: what is long is worked on in a thread, so that it holds up nobody's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from raycore.client.client import EngineCoreClient
from raycore.errors import ConfigurationError
from raycore.http.errors import HttpError, bad_value
from raycore.http.protocol import DetokenizeBody, Message, TokenizeBody, parse
from raycore.http.replies import encode
from raycore.sampling import is_utf8
from raycore.tokenizer import REPLACEMENT, Tokenizer

IN_PLACE_CHARACTERS = 4096
"""Up to this length a text is tokenised on the event loop: about a millisecond, and a thread's two switches cost a tenth of one."""

Result = TypeVar("Result")


class Texts:
    """The pool's tokenizer, as the routes use it. Texts that it cannot take are answered with 400."""

    def __init__(self, client: EngineCoreClient) -> None:
        self._client = client

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; a 400 where this host has none for the pool's model."""
        if self._client.tokenizer is None:
            raise bad_value("this server has no tokenizer for the model; give the prompt as token ids", "prompt", "not_supported")
        return self._client.tokenizer

    async def warm(self) -> None:
        """Load what is loaded at first use, before anybody waits for it."""
        if self._client.tokenizer is not None:
            await asyncio.to_thread(self._client.tokenizer.encode, "warm")

    async def encode(self, text: str, param: str = "prompt") -> list[int]:
        """Token ids of a text that is not empty."""
        tokenizer = self.tokenizer
        _check_text(text, param)
        return await _maybe_in_thread(len(text), tokenizer.encode, text)

    async def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat under the model's template."""
        tokenizer = self.tokenizer
        plain = [message.as_template_takes_it() for message in messages]
        length = 0
        for message in plain:
            _check_text(message["content"], "messages")
            length += len(message["content"])
        try:
            return await _maybe_in_thread(length, tokenizer.apply_chat_template, plain)
        except ConfigurationError:
            raise
        except Exception as error:
            # a template is the model's own program: it refuses, say, roles that do not alternate, by whatever it raises
            raise bad_value(f"the model's chat template does not take these messages: {error}", "messages") from error

    async def tokenize(self, body: bytes) -> bytes:
        """POST /tokenize."""
        ask = parse(TokenizeBody, body)
        if (ask.prompt is None) == (ask.messages is None):
            raise bad_value("give either prompt or messages", "prompt")
        tokens = await self.chat(ask.messages) if ask.messages is not None else await self.encode(ask.prompt or "")
        found: dict[str, Any] = {"count": len(tokens), "max_model_len": self._client.info.max_model_len, "tokens": tokens}
        if ask.return_token_strs:
            found["token_strs"] = [token_text(self.tokenizer, token) for token in tokens]
        return encode(found)

    async def detokenize(self, body: bytes) -> bytes:
        """POST /detokenize."""
        ask = parse(DetokenizeBody, body)
        size = self._client.info.vocab_size
        wrong = next((token for token in ask.tokens if token >= size), None)
        if wrong is not None:
            raise bad_value(f"token id {wrong} is out of range; the vocabulary has {size} tokens", "tokens")
        try:
            text = await _maybe_in_thread(len(ask.tokens), self.tokenizer.decode, ask.tokens)
        except (OverflowError, ValueError, IndexError) as error:
            raise HttpError(400, f"these tokens have no text: {error}", code="invalid_value", param="tokens") from error
        return encode({"prompt": text})


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token alone."""
    return tokenizer.decode([token])


def token_bytes(text: str) -> list[int] | None:
    """The UTF-8 bytes of a token's text; None where the token is a part of a character, which has no text of its own."""
    return None if REPLACEMENT in text else list(text.encode())


def _check_text(text: str, param: str) -> None:
    if not is_utf8(text):
        raise bad_value("the text is not valid Unicode: it has lone surrogates", param)


async def _maybe_in_thread(length: int, work: Callable[[Any], Result], argument: Any) -> Result:
    if length <= IN_PLACE_CHARACTERS:
        return work(argument)
    return await asyncio.to_thread(work, argument)
