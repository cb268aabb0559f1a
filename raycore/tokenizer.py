"""Tokenizers: the Protocol that client and engine share, two implementations, and incremental detokenisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from raycore.errors import ConfigurationError

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet)."""

Messages = Sequence[Mapping[str, str]]
"""A chat: `role` and `content` of each message."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that `decode` knows."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, with the special tokens that the model expects around it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these ids; special tokens have none, broken characters become U+FFFD."""
        ...

    def apply_chat_template(self, messages: Messages) -> list[int]:
        """Token ids of a chat, ready for the assistant's turn."""
        ...

    def save(self, directory: Path) -> None:
        """Write the files from which it can be loaded again; nothing where it has none."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, end of text is 256: for the echo engine, with nothing to install or load."""

    EOS = 256

    @property
    def vocab_size(self) -> int:
        """256 bytes and the end of text."""
        return self.EOS + 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The one id that is no byte."""
        return (self.EOS,)

    def encode(self, text: str) -> list[int]:
        """One id per UTF-8 byte."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; ids from 256 have none."""
        return bytes(token for token in ids if token < self.EOS).decode("utf-8", errors="replace")

    def apply_chat_template(self, messages: Messages) -> list[int]:
        """The contents, one per line; roles mean nothing to bytes."""
        return self.encode("\n".join(message["content"] for message in messages))

    def save(self, directory: Path) -> None:
        """Nothing: bytes need no files."""


class HfTokenizer:
    """A transformers tokenizer of a local checkpoint directory or GGUF file, loaded on first use.

    Lazy because a GGUF tokenizer takes seconds to build, and a caller that passes token ids never needs it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded: Any = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added special tokens included."""
        return len(self._tokenizer())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end of text; a model's generation configuration may name more."""
        eos = self._tokenizer().eos_token_id
        return () if eos is None else (int(eos),)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text."""
        return list(self._tokenizer().encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; spaces are left as the tokens have them."""
        return self._tokenizer().decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def apply_chat_template(self, messages: Messages) -> list[int]:
        """Token ids by the checkpoint's chat template."""
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise ConfigurationError(f"the tokenizer of {self._path} has no chat template; pass a prompt instead of messages")
        return list(tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True, return_dict=False))

    def save(self, directory: Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained` loads."""
        self._tokenizer().save_pretrained(str(directory))

    def loaded(self) -> HfTokenizer:
        """The same, read now: its files may go."""
        self._tokenizer()
        return self

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = _load_hf(self._path)
        return self._loaded


def load_tokenizer(model: str | None) -> Tokenizer:
    """The tokenizer of a checkpoint directory or GGUF file; None stands for bytes (the echo engine).

    Raises ConfigurationError when there is no tokenizer at that path. Nothing is read yet beyond the directory's names.
    """
    if model is None:
        return ByteTokenizer()
    path = Path(model).expanduser()
    if not has_tokenizer(path):
        raise ConfigurationError(
            f"no tokenizer at {str(path)!r}: expected a .gguf file or a directory with {' or '.join(_TOKENIZER_FILES)}"
        )
    return HfTokenizer(path)


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(path: Path) -> bool:
    """Whether this file or directory carries a tokenizer that transformers can load."""
    if path.is_file():
        return path.suffix == ".gguf"
    return any((path / name).is_file() for name in _TOKENIZER_FILES) or sole_gguf(path) is not None


def sole_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory that holds exactly one and no config.json."""
    if not directory.is_dir() or (directory / "config.json").is_file():
        return None
    files = sorted(directory.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _load_hf(path: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    gguf = path if path.is_file() else sole_gguf(path)
    directory, extra = (gguf.parent, {"gguf_file": gguf.name}) if gguf else (path, {})
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, **extra)
    except Exception as error:
        raise ConfigurationError(f"cannot load the tokenizer of {str(path)!r}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


class IncrementalDetokenizer:
    """Turns a growing list of tokens into a growing text, never showing half a character.

    Only a window of tokens is decoded each time: from the last clean boundary but one, so that decoders that treat a first
    token differently (leading spaces) see the same context in both decodings whose difference is the new text.
    """

    def __init__(self, tokenizer: Tokenizer, delivered: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0
        """How many tokens at the start of the window are context, their text published before."""
        self._context_text = ""
        self._emitted = 0
        """Characters of the window published beyond the context."""
        if len(delivered):
            self.push(delivered)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text completed by these tokens; an unfinished character at the end is held back."""
        self._window.extend(int(token) for token in token_ids)
        text = self._tokenizer.decode(self._window)[len(self._context_text) :]
        stable = text.rstrip(REPLACEMENT)
        new = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        if len(stable) == len(text):
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._context_text = self._tokenizer.decode(self._window)
            self._emitted = 0
        return new

    def flush(self) -> str:
        """What is held back, as it stands; for the end of a text."""
        text = self._tokenizer.decode(self._window)[len(self._context_text) + self._emitted :]
        self._emitted += len(text)
        return text
