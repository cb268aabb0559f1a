"""The shipped `serve.yaml` through Serve's own commands: deployed to a cluster with a dashboard, and run in a terminal."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from raycore.exit_codes import ExitCode
from tests.support.head import REPOSITORY, Head, free_ports, raycore, script
from tests.support.waiting import wait_until

LIMIT_S = 120.0

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def shipped(tmp_path: Path) -> tuple[str, str]:
    """The file as it is but for its port, which others of this host may have; and where the application answers."""
    config = yaml.safe_load((REPOSITORY / "examples" / "serve.yaml").read_text())
    assert config["http_options"]["port"] == 8000
    (config["http_options"]["port"],) = free_ports(1)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file), f"http://127.0.0.1:{config['http_options']['port']}"


def curl(head: Head, *arguments: str) -> str:
    return head.run("curl", "-sS", "--max-time", "30", *arguments).stdout


def check_answers(head: Head, url: str) -> None:
    wait_until(lambda: curl(head, "-o", "/dev/null", "-w", "%{http_code}", f"{url}/health") == "200", "the front is healthy", LIMIT_S)
    question = json.dumps({"model": "echo", "prompt": "hello", "max_tokens": 7})
    answer = json.loads(curl(head, f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", question))
    assert answer["choices"][0]["text"] == "hellohe"


def members(head: Head) -> list[int]:
    """Ranks of the application's pool."""
    found = raycore(head, "status", "served", "--json")
    assert found.returncode == 0, found.stderr
    return [member["rank"] for member in json.loads(found.stdout)["members"]]


def test_serve_deploy_and_serve_shutdown(head: Head, shipped: tuple[str, str]) -> None:
    file, url = shipped
    deployed = head.run(script("serve"), "deploy", file, "--address", head.dashboard)
    assert deployed.returncode == 0, deployed.stderr
    check_answers(head, url)
    status = yaml.safe_load(head.run(script("serve"), "status", "--address", head.dashboard).stdout)
    assert status["applications"]["raycore"]["status"] == "RUNNING"
    assert status["applications"]["raycore"]["deployments"]["OpenAIFront"]["replica_states"] == {"RUNNING": 2}
    ended = head.run(script("serve"), "shutdown", "--yes", "--address", head.dashboard)
    assert ended.returncode == 0, ended.stderr
    assert members(head) == [0, 1], "the pool lives outside of Serve"


def test_serve_run_until_ctrl_c(head: Head, shipped: tuple[str, str]) -> None:
    file, url = shipped
    with subprocess.Popen([script("serve"), "run", file], env=head.environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            check_answers(head, url)
        finally:
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert members(head) == [0, 1], "the pool of the deployment before was used"
    assert raycore(head, "cleanup", "served").returncode == 0
    assert raycore(head, "status", "served").returncode == ExitCode.NOT_FOUND
