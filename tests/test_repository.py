"""What the repository promises about itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IS_ABOVE_THE_LAYERS = {"__init__", "__pycache__"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_import_contract_lists_every_module_of_raycore() -> None:
    layers = project()["tool"]["importlinter"]["contracts"][0]["layers"]
    listed = {name.strip(" ()").removeprefix("raycore.") for layer in layers for name in layer.split(":")}
    modules = {path.stem for path in (ROOT / "raycore").iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert modules - IS_ABOVE_THE_LAYERS <= listed


@pytest.mark.parametrize("extra", ["models", "serve", "dev"])
def test_every_extra_exists(extra: str) -> None:
    assert project()["project"]["optional-dependencies"][extra]


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name
