"""Where sockets live: the ipc directory of a process, the id of a host, and the sweep of what dead processes left."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from raycore.errors import ConfigurationError

_DIRECTORY_NAME = re.compile(r"([A-Za-z0-9_.-]+)\.(\d+)\.[0-9a-f]{6}")
_ROOT = Path("/tmp")


def this_host() -> str:
    """An id that is equal for processes which can use each other's ipc paths (a client checks that the path exists, too)."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def is_process_alive(pid: int) -> bool:
    """Whether a process exists and still runs; one that is dead and not reaped yet does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        # the state follows the name, which is in parentheses and may hold anything
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    return True


def _user_root() -> Path:
    root = _ROOT / f"raycore-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    facts = root.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        msg = f"{root} must belong to this user with mode 0700; remove it"
        raise ConfigurationError(msg)
    return root


def make_socket_directory(pool: str) -> Path:
    """A new directory of mode 0700 for one process's sockets, named so that `sweep` can tell whose it is."""
    directory = _user_root() / f"{pool}.{os.getpid()}.{secrets.token_hex(3)}"
    directory.mkdir(mode=0o700)
    return directory


def remove_socket_directory(directory: Path) -> None:
    """Remove a directory that `make_socket_directory` made."""
    shutil.rmtree(directory, ignore_errors=True)


def sweep(pool: str) -> int:
    """Remove the socket directories of this pool whose process is gone; returns how many."""
    removed = 0
    root = _ROOT / f"raycore-{os.getuid()}"
    if not root.is_dir():
        return 0
    for directory in root.iterdir():
        match = _DIRECTORY_NAME.fullmatch(directory.name)
        if match is None or match[1] != pool or is_process_alive(int(match[2])):
            continue
        shutil.rmtree(directory, ignore_errors=True)
        removed += 1
    return removed
