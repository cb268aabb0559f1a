"""What each step takes, without a model."""

from __future__ import annotations

import random

import pytest

from raycore.engines.torch.blocks import BlockPool
from raycore.engines.torch.scheduler import PROMPT_LOGIT_ROWS, Scheduler
from raycore.engines.torch.sequence import Sequence


def make_scheduler(blocks=100, *, budget=16, sequences=8, caching=True) -> Scheduler:
    return Scheduler(BlockPool(blocks, caching=caching), block_size=4, max_batch_tokens=budget, max_sequences=sequences)


def sequence(handle: int, prompt: int, *, priority: int = 0, base: int | None = None) -> Sequence:
    start = 1000 * handle if base is None else base
    return Sequence(handle, list(range(start, start + prompt)), prompt, priority)


def step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """Take a step, give every finished chunk a token; (handle, start, length) of its chunks."""
    chunks = scheduler.schedule()
    taken = [(c.sequence.handle, c.start, c.length) for c in chunks]
    last = [c.is_last for c in chunks]
    scheduler.computed(chunks)
    for chunk, is_last in zip(chunks, last, strict=True):
        if is_last:
            chunk.sequence.tokens.append(1)
    scheduler.check_invariants()
    return taken


def test_a_prompt_over_the_budget_is_taken_in_chunks():
    scheduler = make_scheduler()
    scheduler.add(sequence(1, 40))
    assert [step(scheduler) for _ in range(4)] == [[(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8)], [(1, 40, 1)]]


def test_decodes_come_first_and_prompts_share_what_is_left():
    scheduler = make_scheduler()
    scheduler.add(sequence(1, 4))
    step(scheduler)
    scheduler.add(sequence(2, 10))
    scheduler.add(sequence(3, 10))
    assert step(scheduler) == [(1, 4, 1), (2, 0, 10), (3, 0, 5)]
    assert step(scheduler) == [(1, 5, 1), (2, 10, 1), (3, 5, 5)]


def test_the_lower_priority_number_goes_first_and_ties_go_by_arrival():
    scheduler = make_scheduler(sequences=1)
    for handle, priority in ((1, 5), (2, 0), (3, 0)):
        scheduler.add(sequence(handle, 3, priority=priority))
    assert step(scheduler)[0][0] == 2
    scheduler.remove(2)
    assert step(scheduler)[0][0] == 3
    scheduler.remove(3)
    assert step(scheduler)[0][0] == 1


def test_the_last_in_order_is_preempted_and_computes_again():
    scheduler = make_scheduler(blocks=5, caching=False)
    scheduler.add(sequence(1, 7))
    scheduler.add(sequence(2, 6))
    step(scheduler)
    for _ in range(8):
        step(scheduler)
    assert scheduler.stats.preemptions >= 1
    assert scheduler.running >= 1
    one = scheduler.remove(1)
    assert one is not None
    assert len(one.tokens) == 7 + 9
    assert step(scheduler)[0][:2] == (2, 0)


def test_a_preempted_sequence_finds_its_blocks_in_the_cache():
    scheduler = make_scheduler(blocks=8)
    scheduler.add(sequence(1, 9))
    step(scheduler)
    scheduler.preempt_all()
    assert (scheduler.running, scheduler.waiting, scheduler.pool.held) == (0, 1, 0)
    assert step(scheduler) == [(1, 8, 2)]


def test_a_prefix_is_computed_once_and_its_hits_are_counted():
    scheduler = make_scheduler()
    scheduler.add(sequence(1, 12, base=0))
    step(scheduler)
    scheduler.add(sequence(2, 12, base=0))
    assert step(scheduler) == [(1, 12, 1), (2, 8, 4)]
    assert scheduler.stats.prefix_hit_tokens == 8
    assert scheduler.stats.prefilled_tokens == 12 + 4


def test_the_least_urgent_is_preempted_whenever_it_came():
    scheduler = make_scheduler(blocks=5, caching=False)
    scheduler.add(sequence(1, 7, priority=3))
    scheduler.add(sequence(2, 6, priority=-1))
    step(scheduler)
    for _ in range(8):
        step(scheduler)
    assert scheduler.stats.preemptions >= 1
    urgent = scheduler.remove(2)
    assert urgent is not None
    assert len(urgent.tokens) == 6 + 9, "the urgent one was never put back"
    assert step(scheduler)[0][:2] == (1, 0)


def test_an_urgent_arrival_goes_before_all_that_wait_and_before_a_preempted_one():
    scheduler = make_scheduler(blocks=5, budget=64, caching=False)
    for handle in (1, 2, 3):
        scheduler.add(sequence(handle, 12, priority=1))
    assert step(scheduler) == [(1, 0, 12)]
    scheduler.preempt_all()
    scheduler.add(sequence(4, 12, priority=0))
    assert step(scheduler) == [(4, 0, 12)]
    scheduler.remove(4)
    assert [chunk[0] for chunk in step(scheduler)] == [1]


def test_prompts_that_share_what_another_computes_now_wait_for_it():
    scheduler = make_scheduler(budget=64)
    for handle in (1, 2, 3):
        scheduler.add(sequence(handle, 13, base=0))
    scheduler.add(sequence(4, 9))
    assert step(scheduler) == [(1, 0, 13), (4, 0, 9)]
    assert step(scheduler) == [(1, 13, 1), (4, 9, 1), (2, 12, 1), (3, 12, 1)]
    assert scheduler.stats.prefilled_tokens == 13 + 9 + 2
    assert scheduler.stats.prefix_hit_tokens == 2 * 12


def test_they_do_not_wait_for_little_nor_for_one_that_leaves():
    scheduler = make_scheduler(budget=8)
    scheduler.add(sequence(1, 12, base=0))
    other = sequence(2, 20)
    other.tokens[:4] = range(4)
    scheduler.add(other)
    shared = sequence(3, 12, base=0)
    scheduler.add(shared)
    assert step(scheduler) == [(1, 0, 8)]
    scheduler.remove(1)
    assert [chunk[0] for chunk in step(scheduler)] == [2]
    assert [chunk[0] for chunk in step(scheduler)] == [2]
    assert [chunk[0] for chunk in step(scheduler)] == [2, 3]


def test_prompts_whose_logits_are_due_share_a_step_bound_and_read_no_cache():
    scheduler = make_scheduler(blocks=400, budget=2000)
    scheduler.add(sequence(1, 300, base=0))
    step(scheduler)
    for handle in (2, 3):
        asking = sequence(handle, 300, base=0)
        asking.wants_prompt_logprobs, asking.reads_cache = True, False
        scheduler.add(asking)
    scheduler.add(sequence(4, 5))
    assert step(scheduler) == [(1, 300, 1), (2, 0, PROMPT_LOGIT_ROWS)]
    second = step(scheduler)
    assert second[:2] == [(1, 301, 1), (2, 256, 44)]
    assert second[2][:2] == (3, 0)
    assert sum(length for handle, _, length in second if handle in (2, 3)) <= PROMPT_LOGIT_ROWS + 1
    assert (4, 0, 5) in step(scheduler) + second


def test_nothing_is_admitted_that_does_not_fit_now():
    scheduler = make_scheduler(blocks=4)
    scheduler.add(sequence(1, 12))
    step(scheduler)
    scheduler.add(sequence(2, 5))
    assert [chunk[0] for chunk in step(scheduler)] == [1]
    scheduler.remove(1)
    assert [chunk[0] for chunk in step(scheduler)] == [2]


def test_load_counts_what_is_to_prefill():
    scheduler = make_scheduler()
    scheduler.add(sequence(1, 20))
    scheduler.add(sequence(2, 5))
    assert scheduler.prefill_tokens_waiting == 25
    step(scheduler)
    assert scheduler.prefill_tokens_waiting == 9


@pytest.mark.parametrize("seed", range(8))
def test_any_mix_of_arrivals_and_ends_finishes_with_every_block_free(seed):
    source = random.Random(seed)
    scheduler = make_scheduler(blocks=12, budget=9, sequences=5)
    goals: dict[int, int] = {}
    for handle in range(1, 40):
        prompt = source.randint(1, 30)
        goals[handle] = prompt + source.randint(1, 48 - prompt)
        scheduler.add(sequence(handle, prompt, priority=source.randint(0, 2), base=source.choice((0, 50, None))))
        live = {}
        for _ in range(source.randint(0, 6)):
            step(scheduler)
        if source.random() < 0.1:
            scheduler.remove(source.randint(1, handle))
        live = dict(scheduler._sequences)
        for other, record in live.items():
            if len(record.tokens) >= goals[other]:
                scheduler.remove(other)
    for _ in range(5000):
        if not len(scheduler):
            break
        assert step(scheduler), "work, and nothing is scheduled"
        for other, record in dict(scheduler._sequences).items():
            if len(record.tokens) >= goals[other]:
                scheduler.remove(other)
    assert len(scheduler) == 0
    assert scheduler.pool.held == 0
    scheduler.check_invariants()
