"""Progress with a clock of its own and a terminal that is a string."""

import io
from types import SimpleNamespace

import pytest

from sparsefold import progress
from sparsefold.progress import Progress


class Screen(io.StringIO):
    """A stream that is a terminal, or is none."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def play(clock, screen, total=100, every=0.1, until=100, **options):
    """One update each ``every`` seconds; returns what the screen shows."""
    with Progress(total, "eval", stream=screen, **options) as shown:
        for done in range(options.get("start", 0) + 1, until + 1):
            clock.seconds += every
            shown.update(done, f"loss {done}")
    return screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_done_within_two_seconds_says_nothing(clock, terminal):
    assert play(clock, Screen(terminal), every=0.0199) == ""


def test_a_terminal_gets_one_line_that_is_rewritten_and_ended(clock):
    said = play(clock, Screen(True))  # ten seconds
    assert said.startswith("\reval 2") and said.endswith("\n") and said.count("\n") == 1
    lines = said[1:-1].split("\r")
    assert 30 <= len(lines) <= 42  # five a second for eight seconds
    assert lines[0].startswith("eval 2") and "0:02 spent, 0:08 left" in lines[0]
    assert any("eval 50/100 (50 %), 0:05 spent, 0:05 left, loss 50" in line for line in lines[10:20])


def test_a_shorter_line_covers_a_longer_one(clock):
    screen = Screen(True)
    shown = Progress(10, "eval", stream=screen)
    clock.seconds += 3
    shown.update(5, "a long remark")
    clock.seconds += 3
    shown.update(6)
    long, short = screen.getvalue()[1:].split("\r")
    assert len(short) == len(long) and short.endswith("left" + " " * len(", a long remark"))


def test_where_there_is_no_terminal_lines_are_rare_and_whole(clock):
    said = play(clock, Screen(False), total=1000, until=600)  # a minute
    assert "\r" not in said and said.endswith("\n")
    lines = said.splitlines()
    assert 5 <= len(lines) <= 6
    assert all(line.startswith("eval ") and " spent, " in line and ", loss " in line for line in lines)


def test_the_line_is_ended_when_the_work_fails(clock):
    screen = Screen(True)
    with pytest.raises(KeyboardInterrupt), Progress(10, "train", stream=screen) as shown:
        clock.seconds += 5
        shown.update(5)
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("left\n")


def test_a_resumed_job_reckons_with_its_own_steps_only(clock):
    screen = Screen(True)
    shown = Progress(100, "train", start=80, stream=screen)
    clock.seconds += 10
    shown.update(90)
    assert "train 90/100 (90 %), 0:10 spent, 0:10 left" in screen.getvalue()


def test_before_the_first_step_nobody_knows(clock):
    screen = Screen(True)
    shown = Progress(0, "train", stream=screen)
    clock.seconds += 3
    shown.update(0)
    assert screen.getvalue() == "\rtrain 0/0 (0 %), 0:03 spent, ? left"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (86400 + 61, "24:01:01"), (1e9, "?"),
     (float("nan"), "?"), (float("inf"), "?")],
)  # fmt: skip
def test_durations(seconds, shown):
    assert progress._duration(seconds) == shown


def test_it_writes_to_stderr_unless_told(clock, capsys):
    shown = Progress(10, "eval")
    clock.seconds += 30
    shown.update(5)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("eval 5/10")
