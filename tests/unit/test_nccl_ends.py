"""No NCCL group is made while another is being left, which needs no GPU to be tested."""

from __future__ import annotations

import threading

import pytest

from raycore import nccl

LIMIT_S = 20.0


class Group:
    def __init__(self) -> None:
        self.may_end = threading.Event()

    def abort(self) -> None:
        self.may_end.wait(LIMIT_S)


def waits(ends: nccl._Ends) -> tuple[threading.Thread, threading.Event]:
    is_over = threading.Event()

    def work() -> None:
        ends.wait()
        is_over.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, is_over


def test_a_new_group_waits_for_all_that_are_being_left() -> None:
    ends, first, second = nccl._Ends(), Group(), Group()
    ends.begin(first)
    ends.begin(second)
    _, is_over = waits(ends)
    second.may_end.set()
    assert not is_over.wait(0.05)
    first.may_end.set()
    assert is_over.wait(LIMIT_S)
    ends.wait()


def test_one_that_cannot_be_left_is_not_waited_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_END_S", 0.05)
    ends, stuck, next_one = nccl._Ends(), Group(), Group()
    ends.begin(stuck)
    ends.wait()
    monkeypatch.setattr(nccl, "_END_S", LIMIT_S)
    ends.wait()
    ends.begin(next_one)
    _, is_over = waits(ends)
    stuck.may_end.set()
    assert not is_over.wait(0.05)
    next_one.may_end.set()
    assert is_over.wait(LIMIT_S)
