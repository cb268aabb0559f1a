"""What this machine and environment are missing for raycore, and what to do about it. Ray itself is looked at in `actors/doctor.py`."""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.version import Version

_DISTRIBUTION = "raycore"
_MIB = 1 << 20
_SHARED_MEMORY_MIB = 512
_OPEN_FILES = 4096
_MEMORY_GIB = 4
_GPU_TOOL = "nvidia-smi"
_PROBE_LIMIT_S = 10.0


class Verdict(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True):
    """One check: what was found, and what to do where it is not right."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """All checks but those of a Ray cluster; a check that fails itself is a finding, too."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("zeromq", _zeromq),
        ("sockets", _sockets),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
        ("memory", _memory),
        ("gpus", _gpus),
    ]
    return [finding for name, check in checks for finding in guarded(name, check)]


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check's findings, or the one that it broke."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 -- a doctor that falls ill says nothing of the patient
        return [Finding(name, Verdict.FAIL, f"{type(error).__name__}: {error}", "report this")]


def _python() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    is_new = sys.version_info >= (3, 11)
    return [Finding("python", Verdict.OK if is_new else Verdict.FAIL, version, "" if is_new else "use Python 3.11 or newer")]


def _packages() -> list[Finding]:
    """Each package that raycore needs, and those of its extras that are there in a version that does not fit."""
    findings: list[Finding] = []
    for text in importlib.metadata.requires(_DISTRIBUTION) or []:
        wanted = Requirement(text)
        is_extra = wanted.marker is not None and "extra" in str(wanted.marker)
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if not is_extra:
                findings.append(Finding(wanted.name, Verdict.FAIL, "not installed", f"pip install '{wanted.name}{wanted.specifier}'"))
            continue
        if not wanted.specifier.contains(Version(found), prereleases=True):
            verdict = Verdict.WARN if is_extra else Verdict.FAIL
            findings.append(Finding(wanted.name, verdict, found, f"pip install '{wanted.name}{wanted.specifier}'"))
        elif not is_extra:
            findings.append(Finding(wanted.name, Verdict.OK, found))
    return findings


def _zeromq() -> list[Finding]:
    from raycore.transport.keys import has_curve

    if has_curve():
        return [Finding("encryption", Verdict.OK, "ZeroMQ with CURVE")]
    return [
        Finding("encryption", Verdict.FAIL, "ZeroMQ without CURVE", "install pyzmq's own wheel: engines on other hosts are spoken to in it")
    ]


def _sockets() -> list[Finding]:
    findings: list[Finding] = []
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        findings.append(Finding("loopback", Verdict.OK, "ports can be bound"))
    except OSError as error:
        findings.append(Finding("loopback", Verdict.FAIL, str(error), "let processes bind ports of 127.0.0.1"))
    from raycore.errors import ConfigurationError
    from raycore.transport.endpoints import make_socket_directory, remove_socket_directory

    try:
        directory = make_socket_directory("doctor")
        remove_socket_directory(directory)
        findings.append(Finding("socket files", Verdict.OK, str(directory.parent)))
    except (OSError, ConfigurationError) as error:
        findings.append(Finding("socket files", Verdict.FAIL, str(error), "make /tmp writable, with room for sockets"))
    return findings


def _shared_memory() -> list[Finding]:
    directory = Path("/dev/shm")
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        return [
            Finding("shared memory", Verdict.WARN, "/dev/shm cannot be written", "large tensors go through sockets, which takes longer")
        ]
    free_mib = shutil.disk_usage(directory).free // _MIB
    if free_mib < _SHARED_MEMORY_MIB:
        return [Finding("shared memory", Verdict.WARN, f"{free_mib} MiB free", "give containers more: docker run --shm-size=2g")]
    return [Finding("shared memory", Verdict.OK, f"{free_mib} MiB free")]


def _open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES:
        return [
            Finding(
                "open files",
                Verdict.WARN,
                f"at most {soft}",
                f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}: every client is a socket",
            )
        ]
    return [Finding("open files", Verdict.OK, f"at most {soft}")]


def _memory() -> list[Finding]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available_gib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / (1 << 20)
    found = f"{available_gib:.1f} GiB available, {os.cpu_count()} CPUs"
    if available_gib < _MEMORY_GIB:
        return [Finding("memory", Verdict.WARN, found, "Ray kills processes of a node whose memory is 95 % full")]
    return [Finding("memory", Verdict.OK, found)]


def _gpus() -> list[Finding]:
    tool = shutil.which(_GPU_TOOL)
    if tool is None:
        return [Finding("gpus", Verdict.OK, "no NVIDIA driver: engines run on the CPU")]
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=False)
    if done.returncode:
        return [Finding("gpus", Verdict.FAIL, done.stderr.strip() or done.stdout.strip(), "mend the NVIDIA driver")]
    rows = [Finding(f"gpu {number}", Verdict.OK, line.strip()) for number, line in enumerate(done.stdout.splitlines())]
    if rows and importlib.util.find_spec("torch") is not None:
        found = importlib.metadata.version("torch")
        if found.endswith("+cpu"):
            rows.append(Finding("torch", Verdict.WARN, found, "this build of torch has no CUDA: install one that has, for device='cuda'"))
    return rows
