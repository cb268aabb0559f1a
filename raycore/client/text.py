"""Text for people: detokenised in the client as tokens arrive, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from raycore.tokenizer import IncrementalDetokenizer, Tokenizer


class TextBuilder:
    """One request's text; holds back what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_token_ids: Sequence[int]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = tuple(stop)
        self._silent = frozenset(stop_token_ids) | frozenset(tokenizer.eos_token_ids)
        self._held = ""

    def push(self, token_ids: Sequence[int], *, is_last: bool, stop_reason: int | str | None = None) -> str:
        """The text that became certain with these tokens.

        The engine decides what stops a request (a stop string before `min_tokens` does not), so text is cut only at the string that the
        engine
        named, where the last token completed it.
        """
        spoken = [token for token in token_ids if token not in self._silent]
        if is_last and isinstance(stop_reason, str) and not spoken:
            # a replay that was over on arrival: what completed the stop string had come before
            text = self._held + self._detokenizer.flush()
            cut = text.rfind(stop_reason)
            return text if cut < 0 else text[:cut]
        if not (is_last and isinstance(stop_reason, str)):
            text = self._held + self._detokenizer.push(spoken)
            if is_last:
                text += self._detokenizer.flush()
            keep = 0 if is_last else self._longest_beginning(text)
            self._held = text[len(text) - keep :]
            return text[: len(text) - keep]
        before = self._held + self._detokenizer.push(spoken[:-1])
        text = before + self._detokenizer.push(spoken[-1:]) + self._detokenizer.flush()
        cut = text.find(stop_reason, max(0, len(before) - len(stop_reason) + 1))
        return text if cut < 0 else text[:cut]

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stop):
                return size
        return 0
