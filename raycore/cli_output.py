"""What commands have in common: a result as JSON, and examples at the end of their help."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def print_json(value: Any) -> None:
    """One line on standard output."""
    typer.echo(msgspec.json.encode(value).decode())


def examples(*commands: str) -> str:
    """The epilog of a command's help: rich's markup joins lines that no empty one parts."""
    return "\n\n".join(("Examples:", *commands))
