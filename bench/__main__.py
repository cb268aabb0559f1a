"""`python -m bench`: every measurement, one after the other; `--json DIRECTORY` writes one file each."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHES = ("transport", "pool", "frontends", "http_front", "torch_engine")


def main() -> int:
    """Run each bench in a process of its own, so that none warms the next one up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="directory for one JSON file per bench")
    parser.add_argument("--only", choices=BENCHES)
    options = parser.parse_args()
    if options.json is not None:
        options.json.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in [options.only] if options.only else BENCHES:
        command = [sys.executable, "-m", f"bench.{name}"]
        if options.json is not None:
            command += ["--json", str(options.json / f"{name}.json")]
        status |= subprocess.run(command, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
