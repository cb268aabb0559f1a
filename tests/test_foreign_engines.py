"""Engines that are not raycore's: by import path, in process and on a pool of processes, with the worked example of docs/engines.md."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import raycore
from raycore.engine import Engine
from raycore.engines import make_engine
from raycore.errors import ConfigurationError, InvalidRequestError
from raycore.sampling import SamplingParams
from tests.support.engine_process import client_of, echo_pool

AUTOMATON = "examples.automaton:make_engine"
ROW = [0] * 7 + [1] + [0] * 7


def generations(row: list[int], rule: int, count: int) -> list[int]:
    """What the automaton says, cell by cell."""
    cells: list[int] = []
    for _ in range(count):
        row = [rule >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % len(row)]) & 1 for i in range(len(row))]
        cells += row
    return cells


def in_process(engine: str, **options: Any) -> Any:
    return raycore.make_client(multiprocess_mode=False, asyncio_mode=False, engine=engine, engine_options=options)


@pytest.mark.parametrize("rule", [30, 90, 110])
def test_the_example_in_process(rule: int) -> None:
    with in_process(AUTOMATON, rule=rule) as client:
        assert client.info.engine == "automaton"
        streams = [client.generate(ROW, SamplingParams(max_tokens=15 * count + 4)) for count in range(1, 6)]
        for count, stream in enumerate(streams, 1):
            assert stream.collect().token_ids == generations(ROW, rule, count + 1)[: 15 * count + 4]
        assert client.operations.collective_rpc(method="rule") == [f"rule {rule}"]
        with pytest.raises(InvalidRequestError, match="at least 3 cells"):
            client.generate([1, 0]).collect()
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            client.generate([1, 0, 2])


async def test_the_example_on_a_pool_with_aborts_and_a_pause() -> None:
    with echo_pool(2, engine=AUTOMATON) as pool:
        async with client_of(pool) as client:
            long = client.generate(ROW, SamplingParams(max_tokens=500_000))
            await anext(long)
            await client.operations.pause_scheduler(mode="keep")
            held = [client.generate(ROW[shift:] + ROW[:shift], SamplingParams(max_tokens=150)) for shift in range(10)]
            await client.operations.resume_scheduler()
            for shift, output in enumerate(await asyncio.gather(*(stream.collect() for stream in held))):
                assert output.token_ids == generations(ROW[shift:] + ROW[:shift], 30, 10)
            await long.aclose()


async def test_the_examples_requests_are_replayed_when_its_engine_dies() -> None:
    with echo_pool(2, engine=AUTOMATON, on_engine_death="replay") as pool:
        async with client_of(pool) as client:
            streams = [client.generate(ROW, SamplingParams(max_tokens=60_000)) for _ in range(6)]
            begun = [list((await anext(stream)).token_ids) for stream in streams]
            pool.engines[0].process.kill()
            rest = await asyncio.gather(*(stream.collect() for stream in streams))
    due = generations(ROW, 30, 4000)
    assert [first + output.token_ids for first, output in zip(begun, rest, strict=True)] == [due] * 6
    assert any(output.replayed for output in rest)


def test_the_example_is_the_protocol_and_short() -> None:
    engine: Engine = make_engine(AUTOMATON)
    assert not engine.has_work()
    assert len((Path(__file__).parent.parent / "examples" / "automaton.py").read_text().splitlines()) <= 100


no_function = 5


def none_at_all(**_: Any) -> None:
    """Makes nothing."""


def half_an_engine(**_: Any) -> Any:
    """Has no step."""
    return type("Half", (), {"info": 1, "add": 1, "abort": 1})()


def fails(**_: Any) -> Any:
    """Raises."""
    message = "out of luck"
    raise OSError(message)


def fails_on_import_of_its_own(**_: Any) -> Any:
    """Its library is not here."""
    import a_library_that_is_not_here  # noqa: F401  # type: ignore[import-not-found]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nothing", "no engine is called 'nothing'"),
        ("", "no engine is called ''"),
        ("no.such.module:make", "cannot import 'no.such.module'"),
        ("tests.test_foreign_engines:nobody", "has no function 'nobody'"),
        ("tests.test_foreign_engines:no_function", "is no function, but a int"),
        ("tests.test_foreign_engines:none_at_all", "made a NoneType, which lacks info, add"),
        ("tests.test_foreign_engines:half_an_engine", "lacks step, has_work"),
        (":make", "names an importable module"),
        ("tests.test_foreign_engines:", "names an importable module"),
        ("..x:make", "cannot import"),
    ],
)
def test_a_bad_path_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make_engine(name)


def test_what_a_factory_raises_is_raised_as_it_is() -> None:
    with pytest.raises(OSError, match="out of luck"):
        make_engine("tests.test_foreign_engines:fails")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_here"):
        make_engine("tests.test_foreign_engines:fails_on_import_of_its_own")
