"""What `pip install .` installs: the three packages as they are, their data and the examples, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("raycore", "actors", "elastic")
LIMIT_S = 120


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """Built from a copy: a build writes beside its sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "examples", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return zipfile.Path(built)


def files(root: Path) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: zipfile.Path) -> None:
    names = {name for name in wheel.root.namelist() if not name.endswith("/")}
    information = {name for name in names if name.split("/")[0].endswith((".dist-info", ".data"))}
    assert names - information == set().union(*(files(ROOT / package) for package in PACKAGES))
    assert "raycore/py.typed" in names
    examples = {name.split("/share/raycore/")[1] for name in information if "/share/raycore/" in name}
    assert examples == files(ROOT / "examples")
    assert any(name.endswith("licenses/LICENSE") for name in information)


def test_the_wheel_says_what_it_needs_and_brings_the_command(wheel: zipfile.Path) -> None:
    (about,) = (path for path in wheel.iterdir() if path.name.endswith(".dist-info"))
    facts = Parser().parsestr((about / "METADATA").read_text())
    assert facts["Requires-Python"] == ">=3.11"
    assert set(facts.get_all("Provides-Extra") or ()) == {"models", "serve", "dev"}
    needed = [line for line in facts.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert any(line.startswith("ray[default]") for line in needed)
    assert not any(line.startswith(("transformers", "fastapi", "pytest")) for line in needed)
    assert "raycore = raycore.cli:main" in (about / "entry_points.txt").read_text()
