"""Tokenizers and incremental detokenisation."""

from __future__ import annotations

import subprocess
import sys

import pytest

from raycore.errors import ConfigurationError
from raycore.tokenizer import ByteTokenizer, IncrementalDetokenizer, load_tokenizer

TEXT = "naïve café 🙂🙃 日本語 end"


def test_bytes_go_there_and_back():
    tokenizer = load_tokenizer(None)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (257, (256,))


def test_half_a_character_is_held_back():
    detokenizer = IncrementalDetokenizer(ByteTokenizer())
    pieces = [detokenizer.push((byte,)) for byte in TEXT.encode()]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_a_broken_end_comes_out_with_flush():
    detokenizer = IncrementalDetokenizer(ByteTokenizer())
    assert detokenizer.push("é".encode()[:1]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_broken_bytes_in_the_middle_do_not_hold_up_the_text():
    detokenizer = IncrementalDetokenizer(ByteTokenizer())
    text = "".join(detokenizer.push((byte,)) for byte in b"ab\xff\xffcd") + detokenizer.flush()
    assert text == "ab\ufffd\ufffdcd"


@pytest.mark.parametrize("cut", range(1, len(TEXT.encode())))
def test_it_can_begin_after_delivered_tokens(cut):
    data = TEXT.encode()
    detokenizer = IncrementalDetokenizer(ByteTokenizer(), data[:cut])
    assert data[:cut].decode(errors="ignore") + detokenizer.push(data[cut:]) == TEXT


@pytest.mark.model
def test_a_model_tokenizer_streams_the_same_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.push((i,)) for i in ids) + detokenizer.flush() == tokenizer.decode(ids) == TEXT
    assert tokenizer.vocab_size == 49152


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))


def test_importing_it_imports_neither_torch_nor_transformers():
    code = "import sys, raycore.tokenizer; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
