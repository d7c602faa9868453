"""A rank that works is waited for, one that is silent or ended is named: the ranks of a test are threads."""

import threading
import time

import pytest
import torch.distributed as dist

from cxrdist.distributed import pulse
from cxrdist.distributed.ends import LostRankError
from cxrdist.distributed.pulse import AnsweringStore, Pulse

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of lost ranks

SILENCE_S = 0.4


@pytest.fixture
def pulses(monkeypatch):
    """`pulses(n)`: the pulses of n ranks over one store."""
    store, made = dist.HashStore(), []
    monkeypatch.setattr(pulse, "_connect", lambda rank, timeout_s: store)
    monkeypatch.setattr(pulse, "LOOK_S", 0.05)

    def make(count):
        made.extend(Pulse(rank, count, SILENCE_S) for rank in range(count))
        return made

    yield make
    for one in made:
        one.close(failed=False)


def meet_later(one, seconds, **working):
    """A thread in which a rank comes to the meeting later, at work until then or silent."""

    def act():
        if working:
            with one.working(working["what"]):
                time.sleep(seconds)
        else:
            time.sleep(seconds)
        one.meet()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_a_rank_at_work_is_waited_for_three_times_as_long_as_a_silent_one_and_it_is_said(pulses, capsys):
    first, second = pulses(2)
    begun = time.monotonic()
    other = meet_later(first, 3 * SILENCE_S, what="verify")
    second.meet()
    assert time.monotonic() - begun >= 3 * SILENCE_S
    other.join(5)
    assert "waiting for rank 0 (verify)" in capsys.readouterr().err


def test_a_silent_rank_is_named_within_the_time(pulses):
    first, _, third = pulses(3)
    meet_later(first, 0)
    begun = time.monotonic()
    with pytest.raises(LostRankError, match=r"rank 1 stopped responding: silent for"):
        third.meet()
    assert SILENCE_S <= time.monotonic() - begun < 3 * SILENCE_S


def test_a_rank_that_beats_in_a_loop_is_not_silent(pulses):
    first, second = pulses(2)

    def loop():
        for _ in range(12):
            time.sleep(SILENCE_S / 4)
            first.beat()
        first.meet()

    other = threading.Thread(target=loop, daemon=True)
    other.start()
    second.meet()
    other.join(5)


def test_a_rank_that_ended_is_named_at_once(pulses):
    first, second = pulses(2)
    first.close(failed=True)
    begun = time.monotonic()
    with pytest.raises(LostRankError, match="rank 0 ended"):
        second.meet()
    assert time.monotonic() - begun < SILENCE_S


def test_work_has_a_limit_too(pulses, monkeypatch):
    monkeypatch.setattr(pulse, "WORK_LIMIT", 2)
    first, second = pulses(2)
    meet_later(first, 60, what="verify")
    begun = time.monotonic()
    with pytest.raises(LostRankError, match="rank 0 stopped responding in verify"):
        second.meet()
    assert 2 * SILENCE_S <= time.monotonic() - begun < 6 * SILENCE_S


def test_many_meetings_in_a_row_part_nobody_and_leave_no_keys(pulses):
    ranks = pulses(3)
    threads = [threading.Thread(target=lambda one=one: [one.meet() for _ in range(30)], daemon=True) for one in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert ranks[0]._store._store.num_keys() <= 3 + 3 + 3  # pulses, the last meeting, and one that is being left


def test_a_store_that_does_not_answer_is_lost_and_is_not_asked_again() -> None:
    """The client of torch's store waits without end where a link is cut between two looks."""

    class Cut:
        asked = 0

        def check(self, keys: list[str]) -> bool:
            self.asked += 1
            time.sleep(60)
            return True

        def get(self, key: str) -> bytes:
            raise RuntimeError("no such key")

    behind = Cut()
    store = AnsweringStore(behind, 0.3)
    with pytest.raises(RuntimeError, match="no such key"):
        store.get("a")
    for most in (1.0, 0.1):
        begun = time.monotonic()
        with pytest.raises(LostRankError, match="the machine of rank 0 did not answer"):
            store.check(["a"])
        assert time.monotonic() - begun < most
    assert behind.asked == 1
