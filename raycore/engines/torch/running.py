"""What the torch engine keeps of a request besides its sequence."""

from __future__ import annotations

from raycore.engines.torch.edits import LogitEdits
from raycore.engines.torch.logprobs import PromptLogprobs
from raycore.engines.torch.lora import Adapter
from raycore.engines.torch.sampler import Choice
from raycore.engines.torch.sequence import Sequence as TokenSequence
from raycore.engines.torch.stops import StopChecker
from raycore.sampling import SamplingParams


class RunningRequest:
    """Parameters, stops, edits of logits and the prompt's log probabilities of one request."""

    __slots__ = ("adapter", "edits", "is_first_output", "is_special", "prompt_logprobs", "sampling", "stops")

    def __init__(self, sampling: SamplingParams, stops: StopChecker, sequence: TokenSequence, adapter: Adapter | None = None) -> None:
        """`sequence`: its prompt and the tokens that were delivered before."""
        self.sampling = sampling
        self.stops = stops
        self.adapter = adapter
        self.is_first_output = True
        self.edits: LogitEdits | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self.is_special = bool(sampling.temperature > 0 or sampling.min_tokens or sampling.logprobs is not None)
        """Whether a token of it takes more than the highest logit."""
        if LogitEdits.are_asked_by(sampling):
            self.is_special = True
            prompt, delivered = sequence.tokens[: sequence.prompt_tokens], sequence.tokens[sequence.prompt_tokens :]
            self.edits = LogitEdits(sampling, prompt if sequence.embeds is None else ())
            for token in delivered:
                self.edits.output.push(token)
        if sampling.prompt_logprobs is not None and not sequence.outputs:  # a replay's were delivered with the first token
            self.prompt_logprobs = PromptLogprobs(sampling.prompt_logprobs)
            sequence.wants_prompt_logprobs = True
            sequence.reads_cache = False

    def choice(self, position: int) -> Choice:
        """What the sampler needs for the output token of this position."""
        return Choice(self.sampling, position, self.stops.banned, self.edits)
