"""One way to print and to store what a bench measured, and on what."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_LOOP = 10_000_000
"""An empty loop of so many rounds: shared machines differ by a factor of two from hour to hour, and this says which it was."""


@dataclass(frozen=True)
class Row:
    """One figure: its unit, its floor in the same run, and the aim it is held against."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    floor_name: str = ""
    aim: str = ""
    is_met: bool | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Value over floor."""
        return None if not self.floor else self.value / self.floor


def median(samples: Sequence[float]) -> float:
    """The median of at least one sample."""
    return statistics.median(samples)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    load = os.getloadavg()[0]
    begin = time.perf_counter()
    for _ in range(_LOOP):
        pass
    loop_s = time.perf_counter() - begin
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_before": round(load, 2),
        "empty_loop_of_10_million_s": round(loop_s, 3),
        "versions": {name: _version(name) for name in ("ray", "pyzmq", "msgspec", "uvloop", "torch", "transformers", "numpy")},
    }


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each measurement; the median is reported")
    return parser


def publish(title: str, rows: Sequence[Row], path: Path | None) -> None:
    """Print a table and, where asked, write JSON."""
    facts = machine()
    out = sys.stdout
    out.write(f"\n{title}\n{facts['cores']} x {facts['cpu']}, Python {facts['python']}, load {facts['load_before']}, ")
    out.write(f"an empty loop of 10 million rounds takes {facts['empty_loop_of_10_million_s']} s\n\n")
    for row in rows:
        floor = f"{row.ratio:5.2f} x {row.floor_name} ({row.floor:,.4g})" if row.ratio is not None else ""
        mark = "" if row.is_met is None else ("  met" if row.is_met else "  NOT met")
        out.write(f"{row.name:58} {row.value:12,.4g} {row.unit:10} {floor:44} {row.aim}{mark}\n")
    out.flush()
    if path is not None:
        payload = {"title": title, "machine": facts, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
        path.write_text(json.dumps(payload, indent=1), encoding="utf-8")
