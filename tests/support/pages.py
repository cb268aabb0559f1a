"""Code blocks of the documentation, run as a reader would paste them.

A block whose fence names `python` or `sh` is run, unless the line before it says why not: `<!-- not run: it needs GPUs -->`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.head import REPOSITORY, Head

LIMIT_S = 150.0
SERVERS = ("raycore serve", "serve run")
"""Commands that run until Ctrl-C: they go on in the background until the end of the page."""
_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    text: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in {"python", "sh"} and self.why_not is None


def blocks(page: str) -> list[Block]:
    """Of one page, in order."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["text"], found["why"])
        for found in _BLOCK.finditer(text)
    ]


class Reader:
    """Pastes blocks, with `instead` of some words others, and ends what it started."""

    def __init__(self, head: Head, instead: Mapping[str, str]) -> None:
        self._head = head
        self._instead = instead
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        for server in self._servers:
            server.send_signal(signal.SIGINT)
        for server in self._servers:
            server.wait(LIMIT_S)

    def run(self, block: Block) -> str:
        """What the block printed; it must succeed."""
        text = block.text
        for words, others in self._instead.items():
            text = text.replace(words, others)
        if block.language == "python":
            return self._checked(block, [sys.executable, "-W", "ignore", "-c", text])
        lines = text.splitlines()
        for line in lines:
            if line.startswith(SERVERS):
                self._servers.append(subprocess.Popen(["bash", "-c", f"exec {line}"], env=self._head.environment, cwd=REPOSITORY))
        commands = "\n".join(line for line in lines if not line.startswith(SERVERS))
        return self._checked(block, ["bash", "-euc", commands])

    def _checked(self, block: Block, command: list[str]) -> str:
        done = self._head.run(*command, limit_s=LIMIT_S)
        assert done.returncode == 0, f"{block}: {done.stdout}{done.stderr}"
        return done.stdout
