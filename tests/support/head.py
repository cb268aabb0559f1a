"""A Ray head as its users start it, `ray start --head`, beside whatever other clusters this host has."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray.util
from ray.job_submission import JobSubmissionClient

from actors.serve_flags import PATIENCE
from tests.support.waiting import wait_until

REPOSITORY = Path(__file__).parent.parent.parent
START_LIMIT_S = 120.0
_STOP_LIMIT_S = 60.0
_HEAD_CPUS = 16
_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""What Ray's fake provider of nodes calls the head."""
_DASHBOARD = re.compile(r"RAY_API_SERVER_ADDRESS='(http://[^']+)'")
_EMPTY = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
)
SPARE = "spare"
"""A resource that only nodes have which the autoscaler adds: one of them takes one rank that asks for it."""


@dataclass(frozen=True, slots=True)
class Head:
    """Where the cluster is, and the environment of commands that use it."""

    gcs: str
    dashboard: str
    environment: dict[str, str]

    def run(self, *command: str, limit_s: float = START_LIMIT_S, **more: str) -> subprocess.CompletedProcess[str]:
        """A command as a user of this cluster runs it, in the repository; its output and how it ended."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
            cwd=REPOSITORY,
            env={**self.environment, **more},
        )


def script(name: str) -> str:
    """A command that a package installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def raycore(head: Head, *arguments: str, limit_s: float = START_LIMIT_S) -> subprocess.CompletedProcess[str]:
    """The `raycore` command, as this checkout has it."""
    code = "import sys; from raycore.cli import run; sys.exit(run(sys.argv[1:]))"
    return head.run(sys.executable, "-c", code, *arguments, limit_s=limit_s)


@contextlib.contextmanager
def ray_head() -> Iterator[Head]:
    """A head until the end of the block.

    It has a temporary directory of its own: a job's supervisor looks there for the address of its cluster when it finds several on the
    host, and without one takes any of them. Its autoscaler adds nodes, which are processes here, for what is pending.
    """
    directory = Path(tempfile.mkdtemp(prefix="rc-head-", dir="/tmp"))  # short, since sockets lie below it
    gcs_port, client_port = free_ports(2)  # Ray takes 0 neither for its client server nor where the fake provider has to know the port
    scaling = directory / "autoscaling.json"
    scaling.write_text(json.dumps(_autoscaling(gcs_port)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "disabled",
        "NO_COLOR": "1",
        **PATIENCE,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    fake_nodes = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody is served any more when it ends
    }
    # fmt: off
    command = [
        script("ray"), "start", "--head", "--block", "--disable-usage-stats", "--include-log-monitor", "false",
        "--temp-dir", str(directory), "--num-cpus", str(_HEAD_CPUS), "--port", str(gcs_port), "--ray-client-server-port", str(client_port),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", "0", "--dashboard-agent-listen-port", "0",
        "--autoscaling-config", str(scaling),
    ]
    # fmt: on
    with (directory / "head.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**environment, **fake_nodes}, cwd=REPOSITORY)
        try:
            yield _up(process, directory, environment)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_LIMIT_S)
            finally:
                process.kill()  # its reaper takes the rest along
                process.wait()
                _end_processes(directory)
    shutil.rmtree(directory)


def _up(process: subprocess.Popen[bytes], directory: Path, environment: dict[str, str]) -> Head:
    written = directory / "head.log"

    def dashboard() -> str | None:
        assert process.poll() is None, written.read_text()
        found = _DASHBOARD.search(written.read_text())
        return found and found[1]

    address = wait_until(dashboard, "the head says where its dashboard is", START_LIMIT_S)
    gcs = wait_until(lambda: _text(directory / "ray_current_cluster"), "the head says where it is", START_LIMIT_S)
    client = JobSubmissionClient(address)
    wait_until(lambda: _takes_jobs(client), "the head takes jobs", START_LIMIT_S)
    return Head(gcs, address, {**environment, "RAY_ADDRESS": gcs})


def _end_processes(directory: Path) -> None:
    """End what belongs to the head's session: nodes that the autoscaler added are children of nobody."""
    ours: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(str(directory) in word for word in process.cmdline()):
                ours.append(process)
                process.kill()
    psutil.wait_procs(ours, timeout=_STOP_LIMIT_S)


def _takes_jobs(client: JobSubmissionClient) -> bool:
    """Some seconds after it has an address; until then it refuses them."""
    try:
        client.submit_job(entrypoint="true")
    except RuntimeError as error:
        if "No available agent" not in str(error):
            raise
        return False
    return True


def _autoscaling(gcs_port: int) -> dict[str, object]:
    """A configuration of Ray's fake provider, whose nodes are processes of this host."""
    # As an external provider, since Ray's wheel lacks the defaults that its type `fake_multinode` reads.
    provider = {"type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    address = f"{ray.util.get_node_ip_address()}:{gcs_port}"
    return {
        "cluster_name": "raycore-tests",
        "max_workers": 2,
        "idle_timeout_minutes": 1,
        "provider": {**provider, "gcs_address": address, "launch_multiple": True, "head_node_id": _HEAD_ID},
        **{name: [] for name in _EMPTY},
        "file_mounts": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": _HEAD_CPUS}, "node_config": {}, "max_workers": 0},
            "more": {"resources": {"CPU": 2, SPARE: 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
    }


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, for those who take numbers only."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _text(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""
