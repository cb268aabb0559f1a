"""A rank that joins takes its weights from its peers and reads nothing from disk while one of them has it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from raycore import gloo
from raycore.config import EngineSpec, HealthConfig, Limits
from raycore.core.host import EngineHost
from raycore.engine import Engine
from raycore.engines.torch import EmbedEngine, TorchEngine, TorchEngineOptions, make_torch_engine
from raycore.engines.torch.weight_copy import take_model
from raycore.errors import ConfigurationError, EngineStateError, LockstepError, WeightCopyError
from raycore.groups import GroupKind
from raycore.load_progress import WeightMeter
from raycore.sampling import SamplingParams
from raycore.weight_copies import TensorFact, WeightOffer, WeightRequest
from tests.torch_engine.conftest import DEVICE, Driver
from tests.torch_engine.peers import LIMITS, DyingGroup, FlippingGroup, FrozenGroup, Peer, done, taking_from
from tests.torch_engine.ranks import ranks_on
from tests.torch_engine.test_embed import add_modules, save_encoder
from tests.torch_engine.tiny import GREEDY, engine_on, prompts, save_llama, save_mixtral, save_tokenizer

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the groups here are Gloo's")

PROMPTS = prompts(3)


def options(path: Path, **changes: Any) -> TorchEngineOptions:
    return TorchEngineOptions(**{"model": str(path), "kv_tokens": 1024, "threads": 1, "is_joining": True, **changes})


def answers(engine: Engine) -> list[list[int]]:
    assert isinstance(engine, TorchEngine)
    return [Driver(engine).one(prompt, GREEDY).tokens for prompt in PROMPTS]


def sums(engine: Engine) -> dict[str, str]:
    return engine.utilities()["compute_weight_checksums"]()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tokenizer(save_llama(tmp_path / "tiny"))


@pytest.fixture
def gone(tiny: Path) -> Callable[[], None]:
    """Takes the checkpoint away."""
    return lambda: (tiny.rename(tiny.with_name("elsewhere")), None)[1]


@pytest.fixture
def two(tiny: Path) -> Iterator[tuple[TorchEngine, TorchEngine]]:
    engines = engine_on(tiny), engine_on(tiny)
    yield engines
    for engine in engines:
        engine.close()


def test_a_joiner_is_built_from_two_peers_without_a_checkpoint(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], gone: Callable[[], None]
) -> None:
    with torch.no_grad():
        for engine in two:  # weights that are on no disk
            engine._runner.model.model.norm.weight.mul_(1.5)
    expected = answers(two[0])
    peers, meter = [Peer(i, engine) for i, engine in enumerate(two)], WeightMeter()
    gone()
    with pytest.raises(ConfigurationError, match="does not exist"):
        make_torch_engine(options(tiny))
    joiner = make_torch_engine(options(tiny), taking_from(*peers, meter=meter))
    assert answers(joiner) == expected
    assert sums(joiner) == sums(two[0])
    total = meter.progress.of_bytes
    assert meter.progress.bytes == total
    assert [peer.sent for peer in peers] == [[total // 2], [total - total // 2]]
    assert isinstance(joiner, TorchEngine)
    stopped = Driver(joiner).one(PROMPTS[0], SamplingParams(max_tokens=12, ignore_eos=True, stop=(f"w{expected[0][3]}",)))
    assert len(stopped.tokens) == 1 + expected[0].index(expected[0][3]), "a stop string needs the tokenizer"
    joiner.close()


def test_a_joiner_gives_to_the_next_one(tiny: Path, two: tuple[TorchEngine, TorchEngine], gone: Callable[[], None]) -> None:
    gone()
    first = make_torch_engine(options(tiny), taking_from(Peer(0, two[0])))
    second = make_torch_engine(options(tiny), taking_from(Peer(1, first)))
    assert answers(second) == answers(two[0])
    assert sums(second) == sums(two[0])


@pytest.mark.parametrize("exchanges", [0, 2])
def test_what_a_sender_had_not_sent_when_it_died_comes_from_the_others(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], gone: Callable[[], None], exchanges: int
) -> None:
    peers = [Peer(0, two[0]), Peer(1, two[1], partial(DyingGroup, exchanges=exchanges))]
    gone()
    meter = WeightMeter()
    joiner = make_torch_engine(options(tiny), taking_from(*peers, meter=meter))
    assert sums(joiner) == sums(two[0])
    assert meter.progress.bytes == meter.progress.of_bytes, "nothing was counted twice"
    assert isinstance(peers[1].sent[0], RuntimeError)
    assert len(peers[1].sent) == 1, "it is not asked again"
    assert isinstance(peers[0].sent[0], LockstepError)
    assert peers[0].sent[1] == meter.progress.of_bytes - exchanges * 2 * 4096, "what had come is not sent again"


def test_a_frozen_sender_is_given_up_after_the_limit_of_an_exchange(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], gone: Callable[[], None]
) -> None:
    limits = msgspec.structs.replace(LIMITS, collective_s=1.5, stop_s=1.5)
    peers = [Peer(0, two[0], limits=limits), Peer(1, two[1], partial(FrozenGroup, exchanges=1), limits)]
    gone()
    assert sums(make_torch_engine(options(tiny), taking_from(*peers, limits=limits))) == sums(two[0])
    assert not peers[1].sent, "it neither ended nor failed"


def test_a_sender_that_dies_while_the_group_is_formed_is_not_waited_for(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], gone: Callable[[], None]
) -> None:
    class Half(Peer):
        def give(self, request: WeightRequest) -> Any:
            future: Future[int] = Future()

            def come_and_die() -> None:
                store = gloo.connect(request.address, GroupKind.WORLD, form_s=20.0)
                store.set(f"here {request.group_rank}", b"")
                store.get("decision")
                future.set_exception(RuntimeError("killed"))

            threading.Thread(target=come_and_die, daemon=True).start()
            return future

    peers = [Peer(0, two[0]), Half(1, two[1])]
    gone()
    assert sums(make_torch_engine(options(tiny), taking_from(*peers))) == sums(two[0])
    assert isinstance(peers[0].sent[0], LockstepError)


def test_a_portion_that_came_otherwise_than_it_was_sent_is_sent_again(tiny: Path, two: tuple[TorchEngine, TorchEngine]) -> None:
    peers = [Peer(0, two[0]), Peer(1, two[1], partial(FlippingGroup, exchanges=1))]
    joiner = make_torch_engine(options(tiny), taking_from(*peers))
    assert sums(joiner) == sums(two[0])
    assert len(peers[1].sent) == 2


def test_a_peer_with_other_weights_than_were_offered_gives_nothing(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], gone: Callable[[], None], tmp_path: Path
) -> None:
    other = engine_on(save_llama(tmp_path / "other", intermediate_size=48))
    peers = [Peer(0, two[0]), Peer(1, other)]
    gone()
    joiner = make_torch_engine(options(tiny), taking_from(*peers))
    assert sums(joiner) == sums(two[0])
    assert not peers[1].sent, "it is not asked to"


def test_weights_that_got_another_version_meanwhile_are_not_mixed_with_the_offered_ones(
    tiny: Path, two: tuple[TorchEngine, TorchEngine]
) -> None:
    class Renamed(Peer):
        def give(self, request: WeightRequest) -> Any:
            self.state = msgspec.structs.replace(self.state, weight_version="v2")
            return super().give(request)

    early, late = Peer(0, two[0]), Renamed(0, two[0])
    taking = taking_from(early)
    assert taking.offer() is not None
    early.state = msgspec.structs.replace(early.state, weight_version="v2")
    assert take_model(taking, options(tiny)) is None
    assert not early.sent
    assert take_model(taking_from(late), options(tiny)) is None
    assert "v2" in str(late.sent[0])


def test_without_a_peer_that_gives_the_weights_come_from_disk_and_the_log_says_so(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], caplog: pytest.LogCaptureFixture
) -> None:
    peers = [Peer(i, engine, partial(DyingGroup, exchanges=0)) for i, engine in enumerate(two)]
    with caplog.at_level(logging.WARNING):
        joiner = make_torch_engine(options(tiny), taking := taking_from(*peers))
    assert answers(joiner) == answers(two[0])
    assert taking.taken is None
    assert "no peer is left" in caplog.text


def test_a_manifest_that_does_not_fit_its_configuration_is_not_taken(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], caplog: pytest.LogCaptureFixture
) -> None:
    class Mistaken(Peer):
        def offer(self) -> Any:
            offer: WeightOffer = super().offer().result()
            more = TensorFact("model.layers.7.mlp.up_proj.weight", "torch.float32", (64, 32), 8192)
            manifest = msgspec.structs.replace(offer.manifest, tensors=(*offer.manifest.tensors, more))
            return done(lambda: msgspec.structs.replace(offer, manifest=manifest))

    with caplog.at_level(logging.WARNING):
        assert take_model(taking_from(peer := Mistaken(0, two[0])), options(tiny)) is None
    assert "model.layers.7" in caplog.text
    assert not peer.sent


def test_a_rank_that_is_to_have_another_type_reads_its_own(tiny: Path, two: tuple[TorchEngine, TorchEngine]) -> None:
    assert take_model(taking_from(Peer(0, two[0])), options(tiny, dtype="bfloat16")) is None


def test_an_engine_that_sleeps_offers_nothing(tiny: Path, two: tuple[TorchEngine, TorchEngine], caplog: pytest.LogCaptureFixture) -> None:
    two[0].utilities()["sleep"](level=2)
    joiner = make_torch_engine(options(tiny), taking_from(Peer(0, two[0]), Peer(1, two[1])))
    assert "wake_up" in caplog.text
    assert sums(joiner) == sums(two[1])


@pytest.mark.parametrize("version", [None, "v2"])
def test_a_standby_takes_its_weights_anew_where_they_have_another_version_when_it_is_promoted(
    tiny: Path, two: tuple[TorchEngine, TorchEngine], gone: Callable[[], None], version: str | None
) -> None:
    peer, host = Peer(0, two[0]), EngineHost(standby_spec(tiny), node_ip="127.0.0.1")
    gone()
    host.warm([peer])
    peer.state = msgspec.structs.replace(peer.state, weight_version=version)
    try:
        host.start([peer])
        assert len(peer.sent) == (1 if version is None else 2)
        assert host.weight_progress.from_disk_bytes == 0
        host.check_version(version)
        with pytest.raises(EngineStateError, match="'v3' now"):
            host.check_version("v3")
    finally:
        host.close()


def test_what_was_read_from_disk_is_told(tiny: Path, two: tuple[TorchEngine, TorchEngine]) -> None:
    host = EngineHost(standby_spec(tiny), node_ip="127.0.0.1")
    host.start([Peer(0, two[0], partial(DyingGroup, exchanges=0))])
    progress = host.weight_progress
    assert (progress.bytes, progress.from_disk_bytes) == (0, two[0].rpc_methods()["memory_stats"]()["weights_bytes"])
    host.close()


def test_a_standby_reads_nothing_from_disk_that_a_peer_has_and_did_not_give(tiny: Path, two: tuple[TorchEngine, TorchEngine]) -> None:
    lost, asleep = Peer(0, two[0], partial(DyingGroup, exchanges=0)), Peer(1, two[1])
    two[1].utilities()["sleep"](level=2)
    host = EngineHost(standby_spec(tiny), node_ip="127.0.0.1")
    with pytest.raises(WeightCopyError, match="no peer is left"):
        host.warm([lost])
    with pytest.raises(WeightCopyError, match="wake_up"):
        host.warm([asleep])
    assert host.weight_progress.from_disk_bytes == 0
    two[1].utilities()["wake_up"]()
    host.warm([asleep])
    assert asleep.sent == [host.weight_progress.of_bytes]
    host.close()


def test_a_standby_that_had_nobody_to_take_its_weights_from_takes_them_where_they_have_a_version_by_then(
    tiny: Path, two: tuple[TorchEngine, TorchEngine]
) -> None:
    peer, host = Peer(0, two[0]), EngineHost(standby_spec(tiny), node_ip="127.0.0.1")
    host.warm()
    assert host.weight_progress.from_disk_bytes > 0
    peer.state = msgspec.structs.replace(peer.state, weight_version="v2")
    try:
        host.start([peer])
        assert peer.sent == [host.weight_progress.bytes]
        assert host.weight_progress.from_disk_bytes == 0
    finally:
        host.close()


def test_a_standby_becomes_the_engine_that_its_ranks_own_options_ask_for(tiny: Path, two: tuple[TorchEngine, TorchEngine]) -> None:
    peer, spec = Peer(0, two[0]), standby_spec(tiny)
    spec = msgspec.structs.replace(spec, engine_options={**spec.engine_options, "per_rank": {"2": {"kv_tokens": 512}}})
    for rank, kv_tokens, rounds in ((1, 1024, 1), (2, 512, 3)):
        host = EngineHost(spec, node_ip="127.0.0.1")
        host.warm([peer])
        host.become(msgspec.structs.replace(spec, rank=rank))
        try:
            assert host.start([peer]).info.kv_tokens == kv_tokens
        finally:
            host.close()
        assert len(peer.sent) == rounds


def test_a_standby_of_an_expert_parallel_pool_has_everything_but_experts_and_becomes_a_rank_as_it_is(tmp_path: Path) -> None:
    path = save_mixtral(tmp_path / "moe")
    with ranks_on(path, 2) as ranks:
        info = ranks.engine(0).info
        assert info.is_expert_parallel
        path.rename(tmp_path / "elsewhere")
        peers = [Peer(rank, ranks.engine(rank)) for rank in range(2)]
        spec = msgspec.structs.replace(standby_spec(path), data_parallel_size=2, is_joining=True)
        host = EngineHost(spec, node_ip="127.0.0.1")
        host.get_ready(info)
        host.warm(peers)
        engine = host._engine
        assert isinstance(engine, TorchEngine)
        assert sums(engine) == {name: value for name, value in sums(ranks.engine(0)).items() if ".experts." not in name}
        assert engine.rpc_methods()["expert_placement"]() == {"0": [[]], "1": [[]]}
        host.become(msgspec.structs.replace(spec, rank=2))
        try:
            member = host.start(peers)
            assert (member.engine.rank, member.info.is_expert_parallel, member.info.sync_interval) == (2, True, 1)
            assert host._engine is engine, "nothing was made anew"
            assert [len(peer.sent) for peer in peers] == [1, 1]
            assert host.weight_progress.from_disk_bytes == 0
        finally:
            host.close()


def standby_spec(path: Path) -> EngineSpec:
    return EngineSpec(
        pool="copies",
        rank=1,
        incarnation="s",
        engine="torch",
        model=str(path),
        engine_options={"kv_tokens": 1024, "threads": 1},
        device="cpu",
        tcp="never",
        limits=Limits(),
        timeouts=LIMITS,
        health=HealthConfig(),
        warm_weights=True,
    )


def test_tied_weights_come_once_and_stay_tied(tmp_path: Path) -> None:
    path = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    joiner = make_torch_engine(options(path), taking_from(Peer(0, engine := engine_on(path))))
    assert isinstance(joiner, TorchEngine)
    assert joiner._runner.model.lm_head.weight is joiner._runner.model.model.embed_tokens.weight
    assert answers(joiner) == answers(engine)


def test_an_embedding_model_comes_with_its_pooling(tmp_path: Path) -> None:
    path = add_modules(save_encoder(tmp_path / "encoder"), {"pooling_mode_cls_token": True}, normalises=True, limit=20)
    engine = make_torch_engine(options(path, kv_tokens=None))
    path.rename(tmp_path / "elsewhere")
    joiner = make_torch_engine(options(path, kv_tokens=None), taking_from(Peer(0, engine)))
    assert isinstance(engine, EmbedEngine)
    assert isinstance(joiner, EmbedEngine)
    assert (joiner._pooling, joiner.info) == (engine._pooling, engine.info)
    assert sums(joiner) == sums(engine)


def test_where_experts_are_spread_everything_else_comes_from_peers(tmp_path: Path) -> None:
    path = save_mixtral(tmp_path / "moe")
    with ranks_on(path, 2) as ranks:
        path.rename(tmp_path / "elsewhere")
        peers = [Peer(rank, ranks.engine(rank)) for rank in range(2)]
        joiner = make_torch_engine(options(path, rank=2, data_parallel_size=3), taking_from(*peers))
        mine, theirs = sums(joiner), sums(ranks.engine(0))
        assert mine == {name: value for name, value in theirs.items() if ".experts." not in name}
        assert isinstance(joiner, TorchEngine)
        assert joiner.experts is not None
        assert joiner.info.is_expert_parallel
        assert joiner.rpc_methods()["expert_placement"]() == {"0": [[]], "1": [[]]}
        joiner.close()
