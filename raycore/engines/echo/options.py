"""What an echo engine is told when it is made: its size, and how long its steps take."""

from __future__ import annotations

from typing import Annotated

import msgspec

from raycore.errors import ConfigurationError

NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]

EOS_TOKEN_ID = 256
"""The tokens below it are the bytes of a text."""


class EchoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the echo engine; a step takes `base_s + sequences * per_sequence_s + ...` seconds, which is nothing by default."""

    vocab_size: Annotated[int, msgspec.Meta(ge=EOS_TOKEN_ID + 1, le=1 << 32)] = EOS_TOKEN_ID + 1
    """Bytes and the end of sequence; larger ids echo as well but have no text."""
    max_model_len: Positive = 32_768
    kv_tokens: Annotated[int, msgspec.Meta(ge=2)] = 1 << 20
    """Prompt and output tokens that all running sequences together may hold."""
    max_sequences: Positive = 256
    """Sequences in one step."""
    max_batch_tokens: Positive = 8192
    """Tokens in one step: one for each decoding sequence, the rest for prompts, of which the last may be taken in part."""
    base_s: NonNegative = 0.0
    per_sequence_s: NonNegative = 0.0
    per_kv_token_s: NonNegative = 0.0
    per_prefill_token_s: NonNegative = 0.0
    lockstep: bool = False
    """Step together with the other ranks (`docs/waves.md`); each step has a collective, as an expert-parallel one has."""
    sync_interval: Positive = 1
    """In lockstep: agree every so many steps whether to go on."""
    fail_start: str | None = None
    """For tests: making the engine raises RuntimeError with this text."""

    @property
    def longest(self) -> int:
        """Prompt plus output tokens of one request, at most: what fits the cache alone can always be finished."""
        return min(self.max_model_len, self.kv_tokens)


def check(options: EchoOptions) -> None:
    """Raise ConfigurationError where two options contradict each other."""
    if options.max_batch_tokens < options.max_sequences:
        msg = (
            f"echo engine: max_batch_tokens ({options.max_batch_tokens}) is less than max_sequences ({options.max_sequences}), "
            "so a full batch could not take its step"
        )
        raise ConfigurationError(msg)
    if options.longest < 2:  # noqa: PLR2004 -- one prompt token and one output token
        msg = f"echo engine: max_model_len ({options.max_model_len}) leaves no room for a prompt token and an output token"
        raise ConfigurationError(msg)
