"""The table of operations, and the check of arguments before anything is sent."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest

from raycore.client.operations import AsyncOperations, BlockingOperations, arguments_of
from raycore.errors import InvalidArgumentsError, UnknownOperationError
from raycore.operations import OPERATIONS, TABLE, Arguments, FanOut

REFERENCE = {
    "get_supported_tasks", "pause_scheduler", "resume_scheduler", "is_scheduler_paused", "sleep", "wake_up", "is_sleeping",
    "profile", "reset_mm_cache", "reset_prefix_cache", "reset_encoder_cache", "add_lora", "remove_lora", "list_loras", "pin_lora",
    "save_sharded_state", "collective_rpc", "execute_dummy_batch", "dp_engines_running",
}  # fmt: skip

FULL: dict[str, dict[str, Any]] = {
    "pause_scheduler": {"mode": "keep", "clear_cache": False},
    "sleep": {"level": 2, "mode": "abort"},
    "wake_up": {"tags": ["weights"]},
    "profile": {"start": True, "prefix": "x", "delay_steps": 1, "max_steps": 2, "directory": "/tmp"},
    "reset_prefix_cache": {"reset_running_requests": True, "reset_connector": False},
    "add_lora": {"lora_id": 1, "name": "a", "path": "/a"},
    "remove_lora": {"lora_id": 1},
    "pin_lora": {"lora_id": 1},
    "save_sharded_state": {"path": "/a", "pattern": "{rank}-{part}", "max_size": 5},
    "collective_rpc": {"method": "echo", "args": [1], "kwargs": {"a": 1}},
    "set_weight_version": {"version": "7"},
}


def test_every_operation_of_the_reference_is_declared_once() -> None:
    assert set(OPERATIONS) >= REFERENCE
    assert len(TABLE) == len(OPERATIONS)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_an_operation_is_a_method_with_the_declared_arguments(name: str) -> None:
    for kind in (AsyncOperations, BlockingOperations):
        signature = inspect.signature(getattr(kind, name))
        fields = {field.name for field in msgspec.structs.fields(OPERATIONS[name].arguments)}
        assert set(signature.parameters) == {"self", "rank", "timeout_s", *fields}
        assert not fields & {"rank", "timeout_s"}
        assert getattr(kind, name).__doc__


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_declared_arguments_survive_the_wire(name: str) -> None:
    operation, arguments = arguments_of(name, FULL.get(name, {}))
    assert operation.name == name
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(arguments), type=operation.arguments) == arguments
    assert operation.timeout_s is None or operation.timeout_s > 0
    assert operation.fan_out in FanOut


def test_an_undeclared_operation_is_refused_by_name() -> None:
    for name in ("", "shutdown", "__class__", "add_request", "Sleep"):
        with pytest.raises(UnknownOperationError) as caught:
            arguments_of(name, {})
        assert caught.value.method == name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("pause_scheduler", {"mode": "later"}),
        ("pause_scheduler", {"clear_cache": "yes"}),
        ("pause_scheduler", {"mod": "abort"}),
        ("sleep", {"level": 3}),
        ("sleep", {"level": "1"}),
        ("sleep", {"level": True}),
        ("wake_up", {"tags": ["everything"]}),
        ("wake_up", {"tags": "weights"}),
        ("add_lora", {"lora_id": 1, "name": "a"}),
        ("add_lora", {"lora_id": "1", "name": "a", "path": "/a"}),
        ("remove_lora", {}),
        ("collective_rpc", {}),
        ("collective_rpc", {"method": 5}),
        ("collective_rpc", {"method": "echo", "args": "abc"}),
        ("collective_rpc", {"method": "echo", "args": 1}),
        ("collective_rpc", {"method": "echo", "kwargs": [1]}),
        ("profile", {"delay_steps": "1"}),
        ("resume_scheduler", {"now": True}),
        ("set_weight_version", {"version": 7}),
        ("save_sharded_state", {"path": b"/a"}),
    ],
)
def test_wrong_arguments_are_refused_with_the_operations_name(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentsError, match=name) as caught:
        arguments_of(name, values)
    assert caught.value.method == name
    assert isinstance(caught.value, TypeError)


def test_only_waiting_modes_are_refused_in_process() -> None:
    def refused(name: str, arguments: Arguments) -> bool:
        check = OPERATIONS[name].refused_in_process
        return check is not None and check(arguments) is not None

    for name in ("pause_scheduler", "sleep"):
        kind = OPERATIONS[name].arguments
        assert refused(name, kind(mode="wait"))  # type: ignore[call-arg]
        assert not refused(name, kind(mode="keep"))  # type: ignore[call-arg]
        assert not refused(name, kind())
