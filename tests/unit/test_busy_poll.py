"""When an engine core looks again before it sleeps."""

from __future__ import annotations

from raycore.transport.joint import BusyPoll

LIMIT_S = 0.0005


def test_it_starts_once_a_sleep_would_have_been_spared() -> None:
    poll = BusyPoll(LIMIT_S)
    assert not poll.is_wanted
    poll.slept(LIMIT_S * 2)
    assert not poll.is_wanted, "a long sleep is no reason to look"
    poll.slept(LIMIT_S / 2)
    assert poll.is_wanted


def test_it_ends_after_a_few_looks_in_vain_however_long_it_paid() -> None:
    poll = BusyPoll(LIMIT_S)
    poll.slept(LIMIT_S / 2)
    for _ in range(1000):
        poll.looked(found=True)
    looks = 0
    while poll.is_wanted:
        poll.looked(found=False)
        looks += 1
    assert looks == 4


def test_a_limit_of_zero_switches_it_off() -> None:
    poll = BusyPoll(0.0)
    poll.slept(0.0)
    assert not poll.is_wanted
