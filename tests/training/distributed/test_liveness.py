from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from pivotune.errors import TrainingError
from pivotune.training.distributed import liveness as module
from pivotune.training.distributed.liveness import Liveness, RankState, Seen, find_gone, find_hang, named_losses
from pivotune.training.progress import silent


def rank(number: int, *, silent: float = 0.5, idle: float = 200.0, **state) -> Seen:
    return Seen(RankState(rank=number, host=f"node{number}", pid=100 + number, **state), silent, idle)


def test_no_hang_while_any_rank_moves():
    """Rank 0 alone saves for a long time; the others wait for it."""
    assert find_hang([rank(0, idle=99.0), rank(1, idle=500.0)], 100) is None
    assert find_hang([rank(0, idle=100.0), rank(1, idle=500.0)], 100) is not None


def test_off_without_a_timeout():
    assert find_hang([rank(0, idle=1e9), rank(1, idle=1e9)], 0) is None


def test_a_rank_without_signs_of_life_is_named():
    seen = [rank(0, position=7), rank(1, silent=180.2, position=9), rank(2, position=5)]
    assert (
        find_hang(seen, 100) == "no progress for 100 s: rank 1 (node1, process 101) gives no sign of life since 180 s"
    )


def test_the_rank_that_is_behind_is_named():
    seen = [
        rank(0, position=9, phase="forward and backward", step=4),
        rank(1, position=8, phase="loading data", step=4),
    ]
    assert (
        find_hang(seen, 100)
        == "no progress for 100 s: rank 1 (node1, process 101) is behind: in loading data of step 4"
    )


def test_ranks_at_the_same_place():
    seen = [rank(number, position=9, phase="Scoring the starting model", step=0) for number in range(2)]
    assert (
        find_hang(seen, 60) == "no progress for 60 s: all ranks stand at the same place, in Scoring the starting model"
    )


def test_a_rank_that_has_left_is_not_waited_for():
    done = rank(1, silent=500.0, idle=500.0, position=1, done=True)
    assert find_hang([rank(0, idle=5.0), done], 100) is None
    assert "all ranks stand at" in (find_hang([rank(0), done], 100) or "")
    assert find_hang([done], 100) is None
    assert find_gone([rank(0), done]) == []


def test_gone_is_who_is_not_heard_of():
    assert [state.rank for state in find_gone([rank(0), rank(1, silent=5.0), rank(2, silent=3.9)])] == [1]


@pytest.fixture
def fast(monkeypatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.02)


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.usefixtures("fast")
def test_ranks_see_each_other_and_end_where_nothing_moves():
    store, lines = HashStore(), {}
    ended = [threading.Event(), threading.Event()]

    def end(number: int, line: str) -> None:
        lines[number] = line
        ended[number].set()

    ranks = [Liveness(store, number, 2, 0, lambda line, n=number: end(n, line)) for number in range(2)]
    for number, one in enumerate(ranks):
        one.progress("forward and backward", 3 - number)
        one.progress("loading data", 3, common=number == 0)
        one.start()
    wait_for(lambda: all(len(one.seen()) == 2 for one in ranks))
    # Only now, so that no rank ends before it knows the other.
    for one in ranks:
        one._timeout = 0.3
    for event in ended:
        assert event.wait(60)
    assert {line.partition(" (")[0] for line in lines.values()} == {"no progress for 0.3 s: rank 1"}
    assert all(line.endswith("is behind: in loading data of step 3") for line in lines.values())


@pytest.mark.usefixtures("fast")
def test_progress_is_told_and_leaving_is_no_loss():
    store = HashStore()
    ranks = [Liveness(store, number, 2, 0) for number in range(2)]
    for one in ranks:
        one.start()
    with ranks[0].told_by(silent)("Scoring", 3) as advance:
        advance(1)
    wait_for(lambda: any(view.state.phase == "Scoring" and view.state.ticks == 2 for view in ranks[1].seen()))
    # What one rank does alone puts no other behind.
    assert {view.state.position for view in ranks[1].seen()} == {0}
    ranks[1].close()
    wait_for(lambda: any(view.state.done for view in ranks[0].seen()))
    ranks[0].close(done=False)


def test_a_broken_connection_names_who_is_gone(monkeypatch):
    liveness = Liveness(HashStore(), 0, 2, 0)
    monkeypatch.setattr(liveness, "seen", lambda: [rank(0), rank(1, silent=6.0)])
    with (
        pytest.raises(TrainingError, match=r"lost: rank 1 \(node1, process 101\) \(Connection closed by peer"),
        named_losses(liveness),
    ):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("Connection closed"), TrainingError("known")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, named_losses(Liveness(HashStore(), 0, 2, 0)):
        raise error
    assert raised.value is error
