"""The echo engine: what it says, when it stops, and how it queues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from raycore.engine import EMPTY, Activity, EngineRequest, FinishReason, RequestRefused
from raycore.engines import make_engine
from raycore.engines.echo import EchoEngine, EchoOptions
from raycore.errors import ConfigurationError, NotSupportedError
from raycore.ids import Handle, RequestId
from raycore.sampling import SamplingParams


def request(
    handle: int, prompt: str | Sequence[int], *, delivered: Sequence[int] = (), priority: int = 0, **sampling: Any
) -> EngineRequest:
    ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
    return EngineRequest(
        handle=Handle(handle),
        request_id=RequestId(f"request-{handle}"),
        prompt_token_ids=np.array(ids, dtype=np.uint32),
        sampling=SamplingParams(**sampling),
        delivered=np.array(list(delivered), dtype=np.uint32) if delivered else EMPTY,
        priority=priority,
    )


class Recorder:
    """Steps an engine to the end and keeps what each request got."""

    def __init__(self, engine: EchoEngine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.stop_reasons: dict[int, int | str | None] = {}
        self.order: list[int] = []
        self.most_kv = 0
        self.widest = 0

    def step(self) -> None:
        output = self.engine.step()
        for handle, token in zip(output.handles.tolist(), output.tokens.tolist(), strict=True):
            self.tokens.setdefault(handle, []).append(token)
        for handle, reason in zip(output.finished.tolist(), output.reasons, strict=True):
            assert handle not in self.reasons
            self.reasons[handle] = FinishReason(reason)
            self.order.append(handle)
        for handle, detail in output.details:
            self.stop_reasons[handle] = detail.stop_reason
        load = self.engine.load()
        self.most_kv = max(self.most_kv, load.kv_tokens_used)
        self.widest = max(self.widest, len(output.handles))

    def run(self, *requests: EngineRequest, limit: int = 10_000) -> Recorder:
        for one in requests:
            self.engine.add(one)
        for _ in range(limit):
            if not self.engine.has_work():
                break
            self.step()
        assert not self.engine.has_work()
        load = self.engine.load()
        assert (load.running, load.waiting, load.kv_tokens_used, load.prefill_tokens_waiting) == (0, 0, 0, 0)
        return self

    def text(self, handle: int) -> str:
        return bytes(token for token in self.tokens[handle] if token < 256).decode()


def recorder(**options: Any) -> Recorder:
    return Recorder(EchoEngine(EchoOptions(**options)))


def test_the_output_is_the_prompt_over_and_over() -> None:
    seen = recorder().run(request(3, "abc", max_tokens=8), request(1, "x", max_tokens=2))
    assert seen.text(3) == "abcabcab"
    assert seen.text(1) == "xx"
    assert seen.reasons == {3: FinishReason.LENGTH, 1: FinishReason.LENGTH}
    assert seen.stop_reasons == {}


def test_a_replay_goes_on_where_the_delivered_tokens_end() -> None:
    seen = recorder().run(request(0, "abc", delivered=b"abca", max_tokens=9))
    assert seen.text(0) == "bcabc"


def test_a_replay_that_has_everything_ends_without_a_token() -> None:
    seen = recorder().run(request(0, "abc", delivered=b"ab", max_tokens=2), request(1, "a.b", delivered=b"a.", stop=(".",)))
    assert seen.tokens == {}
    assert seen.reasons == {0: FinishReason.LENGTH, 1: FinishReason.STOP}
    assert seen.stop_reasons == {1: "."}


@pytest.mark.parametrize(
    ("prompt", "sampling", "text", "stop_reason"),
    [
        ("abc", {"stop_token_ids": (ord("c"),)}, "abc", ord("c")),
        ("abc", {"stop_token_ids": (ord("c"),), "min_tokens": 4}, "abcabc", ord("c")),
        ("one. two. ", {"stop": (". ",)}, "one. ", ". "),
        ("one. two. ", {"stop": ("o. ", "wo")}, "one. two", "wo"),
        ("one. two. ", {"stop": (". ",), "min_tokens": 6}, "one. two. ", ". "),
        ("ab", {"stop": ("bab",)}, "abab", "bab"),
        ("ab", {"stop": ("bab",), "min_tokens": 5}, "ababab", "bab"),
        ("grün", {"stop": ("ü",)}, "grü", "ü"),
        ([97, 256, 98], {}, "a", None),
        ([97, 256, 98], {"ignore_eos": True, "max_tokens": 6}, "abab", None),
        ([97, 256, 98], {"ignore_eos": True, "stop": ("bab",)}, "abab", "bab"),
        ([97, 256, 98], {"stop_token_ids": (256,)}, "a", 256),
    ],
)
def test_a_stop_ends_a_request_after_its_token(
    prompt: str | list[int], sampling: dict[str, Any], text: str, stop_reason: int | str | None
) -> None:
    seen = recorder().run(request(0, prompt, **{"max_tokens": 64, **sampling}))
    assert seen.text(0) == text
    assert seen.reasons[0] is (FinishReason.LENGTH if "max_tokens" in sampling else FinishReason.STOP)
    assert seen.stop_reasons.get(0) == stop_reason


def test_the_context_length_ends_a_request() -> None:
    seen = recorder(max_model_len=8).run(request(0, "abcde", max_tokens=100))
    assert seen.text(0) == "abc"
    assert seen.reasons[0] is FinishReason.LENGTH


def test_a_stop_at_the_last_allowed_token_counts_as_a_stop() -> None:
    seen = recorder().run(request(0, "abc", max_tokens=3, stop=("c",)), request(1, "abc", max_tokens=2, stop=("c",)))
    assert seen.reasons == {0: FinishReason.STOP, 1: FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("prompt", "words"), [([], "empty"), ([1] * 16, "at most 15"), ([257], "outside the vocabulary"), ([300] * 9, "outside")]
)
def test_a_prompt_that_can_never_run_is_refused(prompt: list[int], words: str) -> None:
    engine = EchoEngine(EchoOptions(max_model_len=16))
    with pytest.raises(RequestRefused, match=words):
        engine.add(request(0, prompt))
    assert not engine.has_work()


def test_a_larger_vocabulary_echoes_larger_ids() -> None:
    seen = recorder(vocab_size=50_000).run(request(0, [49_999, 7], max_tokens=3))
    assert seen.tokens[0] == [49_999, 7, 49_999]


def test_the_handles_column_is_the_same_object_while_the_batch_is_unchanged() -> None:
    engine = EchoEngine()
    engine.add(request(0, "ab", max_tokens=5))
    engine.add(request(1, "cd", max_tokens=3))
    columns = [engine.step().handles for _ in range(5)]
    assert columns[0] is columns[1] is columns[2]
    assert columns[3] is columns[4]
    assert columns[3].tolist() == [0]


def test_a_full_batch_makes_requests_wait_in_order() -> None:
    seen = recorder(max_sequences=2).run(*(request(i, "ab", max_tokens=3) for i in range(5)))
    assert seen.widest == 2
    assert seen.order == [0, 1, 2, 3, 4]
    assert all(seen.text(i) == "aba" for i in range(5))


def test_a_lower_priority_number_goes_first() -> None:
    seen = recorder(max_sequences=1).run(request(0, "a", priority=1), request(1, "a"), request(2, "a", priority=-1), request(3, "a"))
    assert seen.order == [2, 1, 3, 0]


def test_a_long_prompt_is_taken_in_pieces_beside_decoding() -> None:
    seen = recorder(max_batch_tokens=10, max_sequences=4)
    seen.engine.add(request(0, "ab", max_tokens=10))
    seen.step()
    seen.engine.add(request(1, "x" * 20, max_tokens=2))
    waits: list[int] = []
    for _ in range(3):
        seen.step()
        waits.append(seen.engine.load().prefill_tokens_waiting)
    assert waits == [11, 2, 0]
    assert len(seen.tokens[0]) == 4
    assert seen.tokens[1] == [ord("x")]
    seen.run()
    assert len(seen.tokens[1]) == 2
    assert seen.engine.stats()["prefill_tokens"] == 22


def test_a_full_cache_preempts_the_newest_and_loses_nothing() -> None:
    seen = recorder(kv_tokens=40, max_sequences=4).run(*(request(i, f"{i}abcdefg", max_tokens=20) for i in range(4)))
    assert seen.most_kv <= 40
    assert seen.engine.stats()["preempted"] > 0
    assert seen.order[0] == 0
    for i in range(4):
        assert seen.text(i) == (f"{i}abcdefg" * 3)[:20]


def test_a_preempted_request_still_knows_its_stop() -> None:
    stop = "g3a"
    seen = recorder(kv_tokens=40, max_sequences=4).run(*(request(i, f"{i}abcdefg", max_tokens=20, stop=(stop,)) for i in range(4)))
    assert seen.stop_reasons == {3: stop}
    assert seen.text(3) == "3abcdefg3a"


def test_random_loads_keep_every_bound_and_every_text() -> None:
    random = np.random.default_rng(20)
    for _ in range(30):
        kv, width = int(random.integers(30, 200)), int(random.integers(1, 9))
        seen = recorder(kv_tokens=kv, max_sequences=width, max_batch_tokens=int(random.integers(width, 40)), max_model_len=30)
        requests = [
            request(i, random.integers(0, 256, int(random.integers(1, 29))).tolist(), max_tokens=int(random.integers(1, 40)))
            for i in range(40)
        ]
        aborted: set[int] = set()
        for one in requests:
            seen.engine.add(one)
            if seen.engine.has_work():
                seen.step()
            if random.random() < 0.2:
                victim = int(random.integers(0, one.handle + 1))
                if victim not in seen.reasons:
                    aborted.add(victim)
                seen.engine.abort([victim])
        seen.run()
        assert seen.most_kv <= kv
        assert seen.widest <= width
        for one in requests:
            prompt = one.prompt_token_ids
            count = min(one.sampling.max_tokens, 30 - len(prompt))
            expected = [int(prompt[i % len(prompt)]) for i in range(count)]
            got = seen.tokens.get(one.handle, [])
            if one.handle in aborted:
                assert got == expected[: len(got)]
                assert one.handle not in seen.reasons
            else:
                assert got == expected


def test_prompts_keep_their_text_when_the_arena_is_squeezed_and_grows() -> None:
    long = list(range(250)) * 400
    seen = recorder(max_model_len=200_000, kv_tokens=1_000_000, max_batch_tokens=200_000)
    seen.engine.add(request(0, long, max_tokens=12))
    for i in range(1, 8):
        seen.engine.add(request(i, long[i:], max_tokens=2))
        seen.step()
    seen.run()
    assert seen.tokens[0] == long[:12]
    assert all(seen.tokens[i] == long[i : i + 2] for i in range(1, 8))


def test_an_abort_forgets_running_partial_and_waiting_requests() -> None:
    seen = recorder(max_sequences=2, max_batch_tokens=10)
    for one in (request(0, "ab", max_tokens=50), request(1, "c" * 30), request(2, "d"), request(3, "efg", delivered=b"e", max_tokens=1)):
        seen.engine.add(one)
    seen.step()
    seen.engine.abort([0, 1, 3, 99])
    seen.run()
    assert seen.order == [3, 2]
    seen.engine.abort([0, 1, 2, 3])


def test_a_handle_can_be_used_again_after_an_abort() -> None:
    seen = recorder()
    seen.engine.add(request(0, "abc", stop=("c",)))
    seen.step()
    seen.engine.abort([0])
    seen.tokens.clear()
    seen.run(request(0, "xyc", max_tokens=5))
    assert seen.text(0) == "xycxy"


def test_a_step_takes_the_modelled_time() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    options = EchoOptions(base_s=1.0, per_sequence_s=0.1, per_kv_token_s=0.01, per_prefill_token_s=0.001)
    engine = EchoEngine(options, clock=lambda: now[0], sleep=sleep)
    engine.add(request(0, "ab", max_tokens=3))
    engine.add(request(1, "abc", max_tokens=3))
    engine.step()
    engine.step()
    assert slept == pytest.approx([1.0 + 0.2 + 0.07 + 0.005, 1.0 + 0.2 + 0.09])


def test_a_scheduled_failure_comes_at_its_step() -> None:
    engine = EchoEngine()
    engine.rpc_methods()["fail_at_step"](2)
    engine.add(request(0, "ab", max_tokens=9))
    engine.step()
    with pytest.raises(RuntimeError, match="scheduled"):
        engine.step()


def test_a_stalled_step_declares_its_budget_once() -> None:
    slept: list[float] = []
    engine = EchoEngine(sleep=slept.append)
    engine.rpc_methods()["stall_step"](20.0, budget_s=30.0)
    assert engine.budget_s(Activity.CALL) is None
    assert engine.budget_s(Activity.STEP) == 30.0
    engine.add(request(0, "ab", max_tokens=9))
    engine.step()
    assert slept == [20.0]
    assert engine.budget_s(Activity.STEP) is None


def test_rpc_methods_answer_by_name() -> None:
    methods = EchoEngine().rpc_methods()
    assert methods["echo"](1, "b", c=[2]) == {"args": [1, "b"], "kwargs": {"c": [2]}}
    assert methods["stats"]()["steps"] == 0
    with pytest.raises(NotSupportedError, match="no"):
        methods["raise_error"]("NotSupportedError", "no")
    with pytest.raises(ZeroDivisionError, match="oh"):
        methods["raise_error"]("ZeroDivisionError", "oh")
    with pytest.raises(ValueError, match="no exception"):
        methods["raise_error"]("SystemExit", "never")


def test_resetting_the_cache_of_running_requests_recomputes_them() -> None:
    seen = recorder()
    seen.engine.add(request(0, "abc", max_tokens=6))
    seen.step()
    assert seen.engine.utilities()["reset_prefix_cache"](reset_running_requests=True, reset_connector=False) is True
    assert (seen.engine.load().running, seen.engine.load().waiting) == (0, 1)
    seen.run()
    assert seen.text(0) == "abcabc"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ecco", {}, "'ecco'.*'echo', 'torch'"),
        ("echo", {"kv_tokenz": 3}, "kv_tokenz"),
        ("echo", {"kv_tokens": "many"}, "kv_tokens"),
        ("echo", {"base_s": -1.0}, "base_s"),
        ("echo", {"max_sequences": 10, "max_batch_tokens": 5}, "max_batch_tokens"),
        ("echo", {"max_model_len": 1}, "max_model_len"),
        ("echo", {"per_rank": 3}, "per_rank"),
        ("no_such_module:make", {}, "no_such_module"),
        ("raycore.engines:no_such", {}, "no_such"),
        ("torch", {}, "needs a model"),
    ],
)
def test_a_wrong_name_or_option_is_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_engine(name, None, options, "cpu")


def test_options_can_differ_by_rank() -> None:
    options = {"max_sequences": 4, "per_rank": {"1": {"fail_start": "rank one is broken", "max_model_len": 99}}}
    make_engine("echo", None, options, "cpu", rank=0)
    with pytest.raises(RuntimeError, match="rank one is broken"):
        make_engine("echo", None, options, "cpu", rank=1)


def make_foreign(*, model: str | None, options: dict[str, Any], device: str) -> EchoEngine:
    assert device == "cpu"
    return EchoEngine(EchoOptions(**options), model=model or "")


def test_an_engine_can_come_from_any_module() -> None:
    engine = make_engine(f"{__name__}:make_foreign", "some/model", {"max_model_len": 77}, "cpu")
    assert (engine.info.model, engine.info.max_model_len) == ("some/model", 77)
