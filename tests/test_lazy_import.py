"""`import raycore` is light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import raycore
from raycore.sampling import SamplingParams


def test_importing_raycore_loads_neither_ray_nor_torch() -> None:
    heavy = "{'ray', 'torch', 'zmq', 'transformers'}"
    code = f"import sys, raycore; raycore.SamplingParams(); raycore.RaycoreError; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_names_resolve_on_first_use() -> None:
    assert raycore.SamplingParams is SamplingParams
    assert "launch" in dir(raycore)
    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        _ = raycore.lunch


def test_every_public_name_but_the_entry_points_resolves() -> None:
    for name in set(raycore.__all__) - {"launch", "connect"}:
        assert getattr(raycore, name) is not None
