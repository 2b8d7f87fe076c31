"""What the stopwatch says is what happened."""

import json
import os
import subprocess
from dataclasses import asdict

import numpy as np
import pytest

from sparsefold import _native, bench
from sparsefold.bench import Latency, pinned, provenance, race, time_calls


def test_percentiles_are_those_of_single_calls():
    found = Latency.of(np.arange(101)[::-1] * 1000)  # 0 to 100 us
    assert asdict(found) == {"p50": 50.0, "p99": 99.0, "mean": 50.0, "calls": 101}
    assert found.to_dict() == asdict(found)
    one_slow = Latency.of(np.array([1000] * 199 + [10**9]))
    assert one_slow.p50 == one_slow.p99 == 1.0 and one_slow.mean > 5000
    assert {type(v) for v in found.to_dict().values()} == {float, int}


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setattr(bench.time, "perf_counter_ns", lambda: self.now)

    def takes(self, nanoseconds):
        self.now += nanoseconds


def test_each_call_is_timed_by_itself(monkeypatch):
    clock = Clock(monkeypatch)
    found = time_calls(clock.takes, [5, 1, 30])
    assert found.tolist() == [5, 1, 30] and found.dtype == np.int64
    assert time_calls(clock.takes, []).shape == (0,)


@pytest.mark.parametrize(("count", "rounds"), [(12, 4), (13, 4), (3, 8), (8, 8), (5, 1)])
def test_a_race_gives_every_player_all_inputs_in_order_and_in_turns(count, rounds):
    log = []
    inputs = list(range(count))
    found = race({name: lambda x, name=name: log.append((name, x)) for name in "ab"}, inputs, rounds, warmup=0)
    for name in "ab":
        assert [x for who, x in log if who == name] == inputs
        assert found[name].calls == count
    turns = [name for i, (name, _) in enumerate(log) if i == 0 or log[i - 1][0] != name]
    assert turns == ["a", "b"] * min(rounds, count)


def test_the_warm_up_is_played_and_not_counted(monkeypatch):
    clock, first = Clock(monkeypatch), []

    def player(x):
        clock.takes(10**9 if len(first) < 3 else 2000)
        first.append(x)

    found = race({"a": player}, [7, 8, 9, 10], rounds=2, warmup=3)
    assert first == [7, 8, 9, 7, 8, 9, 10]
    assert found["a"] == Latency(2.0, 2.0, 2.0, 4)


def test_a_slower_moment_of_the_machine_meets_everybody(monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def player(_):
        calls.append(1)
        clock.takes(9000 if len(calls) > 100 else 1000)  # the machine slows down in the middle of the race

    found = race({"a": player, "b": player}, list(range(100)), rounds=10, warmup=0)
    assert found["a"].mean == found["b"].mean == 5.0


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose its processor."
)
def test_pinned_holds_one_processor_and_gives_the_others_back():
    before = os.sched_getaffinity(0)
    with pinned():
        assert os.sched_getaffinity(0) == {max(before)}
        with pinned(min(before)):
            assert os.sched_getaffinity(0) == {max(before)} if len(before) == 1 else {min(before)}
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError), pinned():
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_pinned_does_nothing_where_that_is_unknown(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pinned():
        pass


def test_provenance_names_machine_versions_and_command(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    found = provenance("sparsefold bench a.sfold")
    assert found["command"] == "sparsefold bench a.sfold" and found["commit"] is None
    assert found["isa"] == _native.available_isas()[0] and found["numpy"] == np.__version__
    assert found["cores"] == os.cpu_count() and found["date"].endswith("+00:00")
    assert {"processor", "system", "python", "torch", "sparsefold"} <= found.keys()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [((0, "abc123\n", ""), "abc123"), ((0, "abc123\n", " M a.py\n"), "abc123+"), ((128, "", ""), None)],
)
def test_the_commit_says_whether_files_differ(monkeypatch, answers, expected):
    code, head, changed = answers

    def git(command, **_):
        return subprocess.CompletedProcess(command, code, changed if "status" in command else head, "")

    monkeypatch.setattr(subprocess, "run", git)
    assert provenance("x")["commit"] == expected


def test_lines_are_written_with_their_provenance(tmp_path):
    about = {"processor": "A (R) Chip", "isa": "avx2", "commit": "abc+", "date": "2026-01-02T03:04:05+00:00"}
    path = bench.write_lines(tmp_path, "steps-", about, [{"us": 1.5}, {"us": 2.5}])
    assert path == tmp_path / "a--r--chip-avx2" / "steps-2026-01-02-abc.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{**about, "us": u} for u in (1.5, 2.5)]
