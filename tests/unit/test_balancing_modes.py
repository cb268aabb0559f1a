"""Which ranks a client balances over, by which policy, and how it says why: on the in-memory channel."""

from __future__ import annotations

import re

import pytest

from raycore import api
from raycore.client.scope import BalancingScope, Routing, balancing_scope
from raycore.errors import ConfigurationError, NoEngineError, UnknownRankError
from raycore.ids import Epoch, Term
from raycore.membership import Membership
from raycore.sampling import SamplingParams
from tests.support.scripted import POOL, Rig, memory_client
from tests.support.waiting import until

LONG = SamplingParams(max_tokens=100_000)


async def test_an_external_client_is_bound_to_one_rank() -> None:
    rigs = [Rig(rank=rank) for rank in range(3)]
    scope = balancing_scope("external", rank=1, local_only=False)
    async with memory_client(*rigs, routing=Routing(scope=scope)) as client:
        assert client.ranks() == (1,)
        answers = [await client.generate([n], SamplingParams(max_tokens=2)).collect() for n in range(3)]
        assert {answer.rank for answer in answers} == {1}
        with pytest.raises(UnknownRankError, match="rank 0 does not serve"):
            client.generate([1], data_parallel_rank=0)


async def test_an_external_client_without_its_rank_says_what_there_is() -> None:
    rigs = [Rig(rank=rank) for rank in range(2)]
    with pytest.raises(NoEngineError, match=re.escape("ranks [0, 1], not rank 7")):
        async with memory_client(*rigs, routing=Routing(scope=BalancingScope("external", 7))):
            pass


async def test_a_hybrid_client_keeps_to_its_host_also_when_members_join() -> None:
    rigs = [Rig(rank=0), Rig(rank=1)]
    host = rigs[0].member.endpoints.host
    assert balancing_scope("hybrid", rank=None, local_only=False) == balancing_scope("internal", rank=None, local_only=True)
    async with memory_client(*rigs, routing=Routing(scope=BalancingScope("hybrid", host=host))) as client:
        assert client.ranks() == (0, 1)
    elsewhere = BalancingScope("hybrid", host="elsewhere")
    with pytest.raises(NoEngineError, match="a rank on this node"):
        async with memory_client(*rigs, routing=Routing(scope=elsewhere)):
            pass
    async with memory_client(rigs[0], routing=Routing(scope=BalancingScope("external", 0))) as client:
        both = Membership(POOL, Epoch(9), Term(1), tuple(rig.member for rig in rigs))
        rigs[0].core.set_membership(both)
        await until(lambda: client.membership.epoch == 9, "the newer membership is known")
        assert client.ranks() == (0,)


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"mode": "outside"}, "'internal', 'hybrid', 'external'"),
        ({"mode": "external"}, "needs the rank"),
        ({"rank": 1}, "needs mode 'external'"),
        ({"mode": "external", "rank": 1, "local_only": True}, "local_only"),
        ({"mode": "external", "rank": -1}, "from 0 on"),
        ({"router": "wrok"}, "no router is called"),
        ({"router_options": {"clients": 2}}, "go with a router"),
    ],
)
def test_contradicting_wishes_are_refused_before_anything_is_looked_for(wishes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        api.connect("nowhere", **wishes)


def test_a_wrong_router_is_refused_before_a_pool_is_started() -> None:
    with pytest.raises(ConfigurationError, match="no router is called"):
        api.launch(pool="never", engine="echo", router="wrok")
    with pytest.raises(ConfigurationError, match="no option 'x'"):
        api.launch(pool="never", engine="echo", router="work", router_options={"x": 1})
    with pytest.raises(ConfigurationError, match="no choose"):
        api.launch(pool="never", engine="echo", router=object())


@pytest.mark.parametrize("rank", [2, -1, 10**9])
async def test_a_rank_out_of_range_is_refused_before_anything_is_sent(rank: int) -> None:
    rigs = [Rig(rank=0), Rig(rank=1)]
    async with memory_client(*rigs) as client:
        with pytest.raises(UnknownRankError, match=re.escape("ranks are [0, 1]")):
            client.generate([1], data_parallel_rank=rank)
        assert client.in_flight() == 0
        assert not any(rig.engine.requests for rig in rigs)


async def test_a_client_explains_its_choices() -> None:
    async with memory_client(Rig(rank=0), Rig(rank=1)) as client:
        first = client.generate([1] * 50, LONG, request_id="first")
        second = client.generate([1], LONG, request_id="second")
        pinned = client.generate([1], LONG, request_id="pinned", data_parallel_rank=first.rank)
        why = client.explain("second")
        assert why is not None
        assert (why.rank, why.policy) == (second.rank, "work")
        assert [(row.rank, row.prefill_tokens) for row in why.candidates] == [(second.rank, 0), (first.rank, 50)]
        named = client.explain("pinned")
        assert named is not None
        assert (named.rank, named.policy, named.candidates) == (first.rank, "data_parallel_rank", ())
        assert client.explain("nobody") is None
        for stream in (first, second, pinned):
            await stream.aclose()
        await until(lambda: client.in_flight() == 0, "all are aborted")


class Stubborn:
    """Routes to the highest rank, or to nothing that it was given."""

    answer: object = None

    def choose(self, query: object, ledgers: list) -> object:
        del query
        return self.answer or max(ledgers, key=lambda ledger: ledger.engine.rank)


async def test_a_users_router_routes_and_is_named_when_it_goes_wrong() -> None:
    router = Stubborn()
    async with memory_client(Rig(rank=0), Rig(rank=1), routing=Routing(router)) as client:
        assert {(await client.generate([1], SamplingParams(max_tokens=1)).collect()).rank for _ in range(4)} == {1}
        router.answer = "rank 0"
        with pytest.raises(ConfigurationError, match="'Stubborn' chose 'rank 0'"):
            client.generate([1])
        assert client.in_flight() == 0


async def test_requests_that_share_a_prefix_go_together_where_the_policy_looks_at_prefixes() -> None:
    rigs = [Rig(rank=rank) for rank in range(3)]
    async with memory_client(*rigs, routing=Routing("prefix", {"block_tokens": 16})) as client:
        prompts = {name: [ord(name)] * 64 for name in "abc"}
        homes = {name: (await client.generate(prompt, SamplingParams(max_tokens=1)).collect()).rank for name, prompt in prompts.items()}
        for name, prompt in prompts.items():
            answer = await client.generate([*prompt, 1, 2], SamplingParams(max_tokens=1), request_id=f"more-{name}").collect()
            assert answer.rank == homes[name]
            why = client.explain(f"more-{name}")
            assert why is not None
            assert why.candidates[0].cached_tokens == 64
