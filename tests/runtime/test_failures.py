"""Which failures are tried again: budgets, crash loops, and what is never worth a restart."""

import pickle

import pytest

from nltrain.errors import ConfigError
from nltrain.runtime.config import ClusterConfig
from nltrain.runtime.failures import MAX_SILENT, Failure, FailureLedger, NodeLeaving, RankError

GLOO = "[pair.cc:553] Connection closed by peer [127.0.0.1]:9111"


def caught(error: Exception, rank: int = 0, tokens: int = 0) -> RankError:
    try:
        raise error
    except Exception as raised:
        return RankError.of(raised, rank, tokens)


def failure(message: str = "boom", tokens: int = 5120) -> Failure:
    return Failure.of_ranks({0: caught(ValueError(message), 0, tokens)})


def test_the_same_error_without_progress_stops_at_the_second_time():
    ledger = FailureLedger(ClusterConfig())
    assert ledger.judge(failure(), 5120, 0.0).retry
    verdict = ledger.judge(failure(), 5120, 1.0)
    assert not verdict.retry
    assert "2 times in a row without progress at 5,120 tokens" in verdict.why


def test_numbers_in_the_message_do_not_make_it_another_error():
    ledger = FailureLedger(ClusterConfig())
    assert ledger.judge(failure("nan at step 7 on rank 0"), None, 0.0).retry
    assert not ledger.judge(failure("nan at step 7 on rank 1"), None, 1.0).retry


def test_the_same_error_further_on_is_tried_again():
    ledger = FailureLedger(ClusterConfig())
    for number in range(6):
        assert ledger.judge(failure(tokens=1000 * (number + 1)), None, float(number)).retry


def test_another_error_is_tried_again():
    ledger = FailureLedger(ClusterConfig())
    assert ledger.judge(failure("disk"), None, 0.0).retry
    assert ledger.judge(failure("memory"), None, 1.0).retry


def test_lost_processes_are_bad_luck_until_there_are_many_without_progress():
    ledger = FailureLedger(ClusterConfig(max_failures=100))
    lost = Failure.of_ranks({1: RuntimeError("The actor died")})
    verdicts = [ledger.judge(lost, 4096, float(number)).retry for number in range(MAX_SILENT)]
    assert verdicts == [True] * (MAX_SILENT - 1) + [False]


def test_lost_processes_with_progress_use_the_budget_only():
    ledger = FailureLedger(ClusterConfig(max_failures=10))
    lost = Failure.of_ranks({1: RuntimeError("The actor died")})
    verdicts = [ledger.judge(lost, 1000 * number, float(number)) for number in range(11)]
    assert [verdict.retry for verdict in verdicts] == [True] * 10 + [False]
    assert "cluster.max_failures=10" in verdicts[-1].why


def test_old_failures_leave_the_budget():
    ledger = FailureLedger(ClusterConfig(max_failures=1, failure_window_hours=1.0))
    lost = Failure.of_ranks({1: RuntimeError("The actor died")})
    assert all(ledger.judge(lost, number, 3601.0 * number).retry for number in range(20))


def test_preemptions_have_a_budget_of_their_own():
    ledger = FailureLedger(ClusterConfig(max_failures=0, max_preemptions=2))
    gone = Failure.of_ranks({0: NodeLeaving("left"), 1: caught(RuntimeError(GLOO), 1)})
    assert gone.kind == "preemption"
    assert [ledger.judge(gone, 0, 0.0).retry for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("name", ["ConfigError", "ConfigChangedError", "StaleAttemptError"])
def test_what_no_restart_cures_stops_at_once(name):
    error = caught(type(name, (Exception,), {})("no"))
    assert not FailureLedger(ClusterConfig()).judge(Failure.of_ranks({0: error}), 0, 0.0).retry


def test_waiting_for_nodes_costs_nothing():
    ledger = FailureLedger(ClusterConfig(max_failures=0))
    assert all(ledger.judge(Failure("capacity", "no nodes"), 0, 0.0).retry for _ in range(50))


def test_the_cause_is_told_from_its_consequences():
    failures = {0: caught(RuntimeError(GLOO), 0), 1: caught(ValueError("the cause"), 1, 700), 2: RuntimeError("died")}
    found = Failure.of_ranks(failures)
    assert found.kind == "error"
    assert found.tokens == 700
    assert found.text.startswith("rank 1: ValueError: the cause (test_failures.py:")
    assert "raise error" in found.traceback


def test_a_lost_peer_is_a_death_not_an_error_of_the_program():
    found = Failure.of_ranks({0: caught(RuntimeError(GLOO), 0), 2: RuntimeError("x\nThe actor died: node died")})
    assert found.kind == "death"
    assert found.text == "rank 2 was lost: The actor died: node died"
    assert Failure.of_ranks({0: caught(RuntimeError(GLOO), 0)}).kind == "death"


def test_a_ranks_error_survives_pickling():
    error = pickle.loads(pickle.dumps(caught(ValueError("a\nb"), 3, 17)))
    assert (error.rank, error.type_name, error.message, error.tokens) == (3, "ValueError", "a b", 17)


def test_an_error_of_our_own_is_its_message_and_no_traceback():
    own = caught(ConfigError("output=/x: cannot be written; name a folder"), 1, 512)
    assert (own.text, str(own).startswith("ConfigError: output=/x: cannot be written")) == ("", True)
    assert Failure.of_ranks({1: own}).traceback == ""
    assert "Traceback" in caught(KeyError("a bug")).text
