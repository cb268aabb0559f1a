"""What the demo of a mixture of experts shows, by the memory that there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycore import demo
from raycore.errors import SaveError

_GB = 10**9


@pytest.mark.parametrize(("available_bytes", "sizes"), [(20 * _GB, (2, 4)), (6 * _GB, (1, 2))])
def test_fewer_engine_cores_are_shown_where_memory_is_short(
    available_bytes: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_available_bytes", lambda: available_bytes)
    monkeypatch.setattr(demo, "default_mixture", lambda: "mixture")
    staging = demo.mixture_staging()
    assert (staging.few, staging.many) == sizes
    assert staging.engine_options["dtype"] == "float32", "or the answers could differ"


def test_the_mixture_is_made_once_and_one_that_another_process_made_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raycore.engines.torch import upcycle

    made: list[str] = []

    def make(model: str, target: str, _recipe: object) -> None:
        made.append(model)
        Path(target).mkdir()
        raise SaveError("somebody else was first")

    monkeypatch.setattr(upcycle, "upcycle", make)
    monkeypatch.setattr(demo, "default_model", lambda: str(tmp_path / "dense"))
    assert demo.default_mixture() == demo.default_mixture() == str(tmp_path / "dense-4-experts")
    assert made == [str(tmp_path / "dense")]


def test_a_mixture_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raycore.engines.torch import upcycle

    def fail(_model: str, _target: str, _recipe: object) -> None:
        raise SaveError("no space")

    monkeypatch.setattr(upcycle, "upcycle", fail)
    monkeypatch.setattr(demo, "default_model", lambda: str(tmp_path / "dense"))
    with pytest.raises(SaveError, match="no space"):
        demo.default_mixture()
