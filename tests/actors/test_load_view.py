"""Bars while weights load: from the tensors that transformers takes to the driver's terminal, and nothing where nobody watches."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from actors import driver
from actors.copy_view import CopyView
from actors.load_view import LoadView
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.ids import Rank
from raycore.load_progress import LoadProgress, counted, load_progress


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=97)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_tensors_of_a_checkpoint_are_counted(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(counted([])) == []
    capfd.readouterr()
    TorchEngine.create(TorchEngineOptions(model=str(model), kv_tokens=64, device="cpu")).close()
    progress = load_progress()
    assert progress.total > 10
    assert progress.done == progress.total
    assert capfd.readouterr().err == "", "transformers drew a bar of its own"


def test_items_are_counted_as_they_are_taken() -> None:
    items = counted(["a", "b", "c"])
    assert next(items) == "a"
    assert load_progress() == LoadProgress(0, 3)
    assert next(items) == "b"
    assert load_progress() == LoadProgress(1, 3)


async def test_a_person_sees_a_bar_for_each_rank_and_nobody_else_anything() -> None:
    for is_terminal in (True, False):
        out = io.StringIO()
        view = LoadView("chat", Console(file=out, force_terminal=is_terminal, width=100))
        async with view.shown():
            for rank in (0, 1):
                view.show(Rank(rank), LoadProgress(0, 0))
                view.show(Rank(rank), LoadProgress(3 + rank, 21))
            await asyncio.sleep(0.2)
        if is_terminal:
            for words in ("chat rank 0 loads", "chat rank 1 loads", "3/21", "4/21"):
                assert words in out.getvalue()
        else:
            assert out.getvalue() == ""


async def test_a_person_who_scales_sees_bytes_and_rate_and_nobody_else_anything() -> None:
    now = {"bytes": 3_000_000, "of_bytes": 5_000_000, "bytes_per_s": 2.5e6}

    async def status() -> dict[str, Any]:
        return {"operations": [{"weights": now}]}

    for is_terminal in (True, False):
        out = io.StringIO()
        view = CopyView("chat", status, Console(file=out, force_terminal=is_terminal, width=120))
        async with view.shown():
            view.show({"operations": []})
            view.show({"operations": [{"weights": {"bytes": 0, "of_bytes": 0, "bytes_per_s": 0.0}}]})
            view.show(await status())
            await asyncio.sleep(0.2)
        if is_terminal:
            for words in ("chat: weights from peers", "3.0/5.0 MB", "2.5 MB/s"):
                assert words in out.getvalue()
        else:
            assert out.getvalue() == ""


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
async def test_the_ranks_of_a_pool_tell_their_progress(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import raycore

    seen: dict[int, LoadProgress] = {}

    class Watching(LoadView):
        def __init__(self, pool: str) -> None:
            super().__init__(pool, Console(file=io.StringIO(), force_terminal=True))

        def show(self, rank: Rank, progress: LoadProgress) -> None:
            super().show(rank, progress)
            seen[rank] = progress

    monkeypatch.setattr(driver, "LoadView", Watching)
    options = {"threads": 1, "kv_tokens": 64}
    async with raycore.launch(pool="bars", engine="torch", model=str(model), data_parallel_size=2, engine_options=options):
        assert set(seen) == {0, 1}
