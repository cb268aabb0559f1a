"""What the doctor says where something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import resource

import pytest

from raycore import doctor
from raycore.cli import run
from raycore.doctor import Finding, Verdict


def found(name: str) -> Finding:
    return next(finding for finding in doctor.examine() if finding.name == name)


def test_a_healthy_environment_has_no_failure() -> None:
    assert [finding for finding in doctor.examine() if finding.verdict is Verdict.FAIL] == []


def test_a_package_that_is_too_old_or_missing_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.metadata.version

    def version(name: str) -> str:
        if name == "uvloop":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.13.0" if name == "torch" else true(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert (found("torch").verdict, found("torch").advice) == (Verdict.FAIL, "pip install 'torch>=2.10'")
    assert (found("uvloop").verdict, found("uvloop").found) == (Verdict.FAIL, "not installed")
    assert found("msgspec").verdict is Verdict.OK


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, 8192))
    assert (found("open files").verdict, found("open files").advice.split(":")[0]) == (Verdict.WARN, "ulimit -n 8192")


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise ZeroDivisionError("oh")

    (finding,) = doctor.guarded("x", broken)
    assert (finding.name, finding.verdict, finding.found) == ("x", Verdict.FAIL, "ZeroDivisionError: oh")


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.OK, 0), (Verdict.WARN, 0), (Verdict.FAIL, 1)])
def test_the_exit_code_says_whether_it_can_work(
    verdict: Verdict, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from raycore import api

    monkeypatch.setattr(api, "doctor", lambda: [Finding("thing", verdict, "[as found]", "do this")])
    assert run(["doctor"]) == code
    assert "[as found]" in capfd.readouterr().out
    assert run(["doctor", "--json"]) == code
    assert json.loads(capfd.readouterr().out) == [{"name": "thing", "verdict": verdict, "found": "[as found]", "advice": "do this"}]
