"""The training loop: typed settings, windows, exact resume whatever stopped it, and nothing lost or half-written."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparsefold import program
from sparsefold.data import load_text
from sparsefold.nn import EGRU, Stack
from sparsefold.progress import Progress
from sparsefold.recipes import _loop, text
from sparsefold.recipes._checkpoint import read_checkpoint
from sparsefold.recipes._config import check_ranges, from_dict, override
from sparsefold.recipes._windows import Windows, bits_per_char


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    count: int = 1
    rate: float | None = 0.5
    name: str = ""
    kind: Literal["one", "two"] = "one"
    flag: bool = False
    block: tuple[int, int] = (16, 1)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("count=7", {"count": 7}),
        ("rate=1e-2", {"rate": 0.01}),
        ("rate=3", {"rate": 3.0}),
        ("rate=none", {"rate": None}),
        ("rate=None", {"rate": None}),
        ("rate=", {"rate": None}),
        ("name=a=b c", {"name": "a=b c"}),
        ("name=", {"name": ""}),
        ("kind=two", {"kind": "two"}),
        ("flag=True", {"flag": True}),
        ("flag=no", {"flag": False}),
        ("block=8x4", {"block": (8, 4)}),
        ("block=1X1", {"block": (1, 1)}),
    ],
)
def test_an_override_has_the_type_of_its_setting(word, expected):
    changed = override(Settings(), [word])
    assert changed == replace(Settings(), **expected)
    for f in fields(changed):
        assert type(getattr(changed, f.name)) is type(getattr(replace(Settings(), **expected), f.name))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["conut=3"], r"unknown key 'conut'. Did you mean count"),
        (["zzzz=3"], r"unknown key 'zzzz'. Known keys: count, rate, name, kind, flag, block\."),
        (["=3"], r"unknown key ''"),
        (["Count=3"], r"unknown key 'Count'. Did you mean count"),
        (["count"], r"written key=value; got 'count'"),
        ([""], r"written key=value; got ''"),
        (["count=3", "rate=1", "count=3"], r"count is given twice"),
        (["count=1.5"], r"count must be a whole number; got '1\.5'"),
        (["count=none"], r"count must be a whole number; got 'none'"),
        (["rate=fast"], r"rate must be a number or none; got 'fast'"),
        (["kind=three"], r"kind must be one of one, two; got 'three'"),
        (["flag=perhaps"], r"flag must be true or false; got 'perhaps'"),
        (["block=16"], r"block must be whole numbers like 16x1; got '16'"),
        (["block=4x4x4"], r"like 16x1; got '4x4x4'"),
        (["block=axb"], r"like 16x1; got 'axb'"),
    ],
)
def test_a_wrong_override_gets_a_sentence(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        override(Settings(), words)


@pytest.mark.parametrize("setting", text.Config.__dataclass_fields__)
def test_every_default_of_the_text_recipe_survives_the_command_line_and_json(setting):
    value = getattr(text.Config(), setting)
    word = f"{setting}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
    assert override(text.Config(), [word]) == text.Config()
    assert from_dict(text.Config, json.loads(json.dumps(asdict(text.Config())))) == text.Config()


def test_a_config_of_another_version_is_refused():
    with pytest.raises(ValueError, match=r"unknown key 'colour'; it was written by another version"):
        from_dict(text.Config, {"colour": 3, "hidden": 4})


@pytest.mark.parametrize(
    "word",
    [
        "hidden=0", "hidden=100000000", "layers=0", "embedding=0", "steps=0", "batch=-1", "window=0", "threads=0",
        "threads=100000", "eval_every=0", "checkpoint_every=0", "prune_every=0", "patience=-1", "density=-0.1",
        "density=1.5", "density=nan", "lr=0", "lr=-1", "lr=nan", "lr=inf", "clip=-1", "clip=nan", "weight_decay=-1",
        "dropout=1.5", "warmup=-0.1", "warmup=2", "target_rate=2", "rate_weight=-1", "rate_start=-1", "rate_until=2",
        "threshold=-1", "seed=-1", "seed=99999999999999999999", "prune_begin=0.8", "prune_until=1.2",
        "prune_begin=-0.1",
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_before_anything_runs(word):
    with pytest.raises(ValueError, match=word.partition("=")[0]) as error:
        override(text.Config(), [word])
    assert str(error.value).endswith(".")


def test_ranges_are_closed_and_finite():
    for low in (0, 0.5):
        check_ranges(Settings(), {"rate": (low, 0.5)})
    check_ranges(Settings(rate=None), {"rate": (1, 2)})
    with pytest.raises(ValueError, match=r"^rate is in \[0, 0\.4\], got 0\.5\.$"):
        check_ranges(Settings(), {"rate": (0, 0.4)})
    with pytest.raises(ValueError, match=r"^rate is at least 0, got inf\.$"):
        check_ranges(Settings(rate=math.inf), {"rate": (0, math.inf)})


# --- data and measures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "batch", "length"), [(101, 4, 5), (101, 4, 25), (104, 4, 5), (7, 1, 6), (50, 7, 3)])
def test_a_pass_of_windows_reads_every_stream_once_in_order(tokens, batch, length):
    sequence = np.arange(tokens)
    windows = Windows(sequence, batch, length)
    per_stream = (tokens - 1) // batch
    assert windows.per_pass == per_stream // length
    xs, ys, starts = zip(*(windows[i] for i in range(windows.per_pass)), strict=True)
    x, y = torch.cat(xs), torch.cat(ys)
    whole = windows.per_pass * length
    assert x.shape == (whole, batch)
    assert starts == (True, *[False] * (windows.per_pass - 1))
    for stream in range(batch):
        first = stream * per_stream
        assert x[:, stream].tolist() == sequence[first : first + whole].tolist()
    assert torch.equal(y, x + 1)
    again = windows[windows.per_pass * 3]
    assert again[2] is True
    assert torch.equal(again[0], xs[0])
    assert torch.equal(again[1], ys[0])


def test_too_few_tokens_for_a_window_are_refused():
    Windows(np.arange(4 * 5 + 1), 4, 5)
    with pytest.raises(ValueError, match=r"20 tokens are too few for 4 streams of at least one window of 5 steps"):
        Windows(np.arange(20), 4, 5)


@pytest.mark.parametrize("layer", [torch.nn.GRU(5, 6, 2, dropout=0.5), EGRU(5, 6, 2, dropout=0.5)], ids=["gru", "egru"])
@pytest.mark.parametrize(("tokens", "streams"), [(100, 4), (101, 4), (90, 16), (5, 3)])
def test_bits_per_char_is_what_a_loop_over_every_byte_says(layer, tokens, streams):
    torch.manual_seed(0)
    model = Stack(torch.nn.Embedding(7, 5), layer, torch.nn.Linear(6, 7)).double().train()
    sequence = np.random.default_rng(0).integers(0, 7, tokens)
    bits = bits_per_char(model, sequence, streams, window=256)
    assert model.training, "evaluation gives the model back as it was"
    pieces = max(1, min(streams, (tokens - 1) // 8))
    size, nats = (tokens - 1) // pieces, []
    model.eval()
    for piece in range(pieces):
        state = None
        for at in range(piece * size, (piece + 1) * size):
            with torch.no_grad():
                logits, state, _ = model(torch.tensor([[sequence[at]]]), state)
            row = logits[0, 0].numpy()
            nats.append(np.log(np.exp(row).sum()) - row[sequence[at + 1]])
    assert bits == pytest.approx(np.mean(nats) / np.log(2), rel=1e-6)
    assert bits_per_char(model, sequence, streams, window=3) == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_one_cycle_rises_to_its_peak_and_falls_to_nothing(warmup):
    at = np.linspace(0, 1, 1000, endpoint=False)
    rate = np.array([text.one_cycle(p, warmup) for p in at])
    up, down = rate[at < warmup], rate[at >= warmup]
    assert (np.diff(up) > 0).all()
    assert (np.diff(down) < 0).all()
    assert rate.max() == pytest.approx(1, abs=1e-4)
    assert rate.min() > 0
    if warmup > 0:
        assert rate[0] == pytest.approx(1 / 25)
    if warmup < 1:
        assert text.one_cycle(warmup, warmup) == pytest.approx(1)
        assert rate[-1] < 1e-4
        middle = text.one_cycle((1 + warmup) / 2, warmup)
        assert middle == pytest.approx(0.5, abs=1e-4), "a cosine, not a line"


def test_the_rivals_dense_gru_starts_as_the_event_gru_does():
    dense, events = (text.build(text.Config(cell=cell, hidden=64), 9)[1] for cell in ("gru", "egru"))
    for name, p in dense.named_parameters():
        other = getattr(events, name)
        if name.startswith("bias"):
            assert torch.equal(p, other)
        else:
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.05)
            assert other.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.05)
    assert dense.bias_ih_l0[64:128].tolist() == [1.0] * 64


# --- runs ------------------------------------------------------------------------------------------------------------

STEPS = 44
BASE = {"hidden": 16, "embedding": 6, "batch": 4, "window": 8, "steps": STEPS, "eval_every": 7, "checkpoint_every": 10}
EGRU_RUN = {
    "cell": "egru",
    "layers": 2,
    "dropout": 0.3,
    "density": 0.5,
    "learn_threshold": True,
    "prune_begin": 0.2,
    "prune_every": 3,
}
RUNS = {
    "egru": EGRU_RUN,
    "gru": {"cell": "gru", "layers": 2, "dropout": 0.3},
    "egru-unpruned": {"cell": "egru", "output": "events"},
}


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    """1600 bytes: a pass over the training split is 39 windows, so that a run crosses the start of another."""
    file = tmp_path_factory.mktemp("corpus") / "a.txt"
    corpus = load_text()
    file.write_bytes(bytes(corpus.vocabulary[t] for t in corpus.train[5000:6600]))
    return file


@pytest.fixture(scope="module")
def config(corpus_file):
    def make(run: str = "egru", **changes: object) -> text.Config:
        return text.Config(**{"file": str(corpus_file), **BASE, **RUNS[run], **changes})

    return make


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """Folder and summary of each run, from its first step to its last without a stop."""
    done = {}

    def get(run: str) -> tuple[Path, dict]:
        if run not in done:
            folder = tmp_path_factory.mktemp(run)
            done[run] = folder, text.run(config(run), folder)
        return done[run]

    return get


@pytest.fixture
def stop_at(monkeypatch):
    """A function that makes the next run meet signals when it has finished a step; training goes on one step further."""

    def arrange(step: int, *numbers: signal.Signals) -> None:
        def strike(self: Progress, done: int, note: str = "") -> None:
            if done == step:
                for number in numbers:
                    signal.raise_signal(number)

        monkeypatch.setattr(Progress, "update", strike)

    return arrange


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last.safetensors")


def log(folder: Path) -> list[dict]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def timeless(summary: dict) -> dict:
    return {k: v for k, v in summary.items() if k != "seconds"}


def assert_same_run(folder: Path, expected: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        got, wanted = (load_file(f / name) for f in (folder, expected))
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert got[key].dtype == wanted[key].dtype
            assert torch.equal(got[key], wanted[key]), f"{key} of {name} has other bits"
        got, wanted = (dict(read_checkpoint(f / name)[1]["progress"], seconds=0) for f in (folder, expected))
        assert got == wanted
    assert log(folder) == log(expected)
    assert leftovers(folder) == []


def leftovers(folder: Path) -> list[str]:
    known = {"last.safetensors", "best.safetensors", "log.jsonl"}
    return [p.name for p in folder.iterdir() if p.name not in known]


def test_a_checkpoint_holds_all_that_has_bits(uninterrupted):
    folder, _ = uninterrupted("egru")
    kinds = Counter(key.split(".")[0] for key in bits(folder))
    assert kinds.keys() == {"model", "optimizer", "pruner", "random", "state"}
    assert sorted(k for k in bits(folder) if k.startswith("pruner.masks")) == [
        "pruner.masks.1.weight_hh_l0", "pruner.masks.1.weight_hh_l1", "pruner.masks.1.weight_ih_l1",
    ]  # fmt: skip
    assert sorted(k for k in bits(folder) if k.startswith("state")) == ["state.1.0", "state.1.1"], "both y and h"


@pytest.mark.parametrize(
    ("run", "stops"),
    [
        ("egru", [1]),
        ("egru", [6, 20, 38]),  # before an evaluation, on the way down in density, at the start of a new pass
        ("egru-unpruned", [13]),
        ("gru", [9, 31]),
    ],
    ids=lambda v: str(v),
)
def test_a_run_stopped_by_ctrl_c_resumes_with_the_same_bits(
    run, stops, config, uninterrupted, stop_at, tmp_path, monkeypatch
):
    for stop in stops:
        stop_at(stop, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=rf"^stopped after step {stop + 1}; everything is saved in "):
            text.run(config(run), tmp_path)
        assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] == stop + 1
    monkeypatch.undo()
    torch.rand(100)  # whatever ran in between, the random state is the run's own
    summary = text.run(config(run), tmp_path)
    folder, expected = uninterrupted(run)
    assert timeless(summary) == timeless(expected)
    assert_same_run(tmp_path, folder)


def test_state_is_carried_within_a_pass_and_zero_where_the_next_begins(config, tmp_path, monkeypatch):
    given = []
    forward = Stack.forward

    def watched(self: Stack, x: torch.Tensor, state: object = None) -> object:
        if self.training:
            given.append(state)
        return forward(self, x, state)

    monkeypatch.setattr(Stack, "forward", watched)
    text.run(config(), tmp_path)
    per_pass = Windows(load_text(config().file).train, BASE["batch"], BASE["window"]).per_pass
    assert [i for i, state in enumerate(given) if state is None] == [0, per_pass]
    assert not any(s.y.requires_grad for state in given if state for s in state if s is not None), "cut from the past"


def test_ctrl_c_during_an_evaluation_is_saved_after_it(config, uninterrupted, tmp_path, monkeypatch):
    calls = []

    def evaluate(*args: object) -> float:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return bits_per_char(*args)

    monkeypatch.setattr(text, "bits_per_char", evaluate)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 21;"):
        text.run(config(), tmp_path)
    text.run(config(), tmp_path)
    assert_same_run(tmp_path, uninterrupted("egru")[0])


def test_a_killed_run_resumes_with_the_same_bits(config, uninterrupted, tmp_path):
    """SIGKILL between an evaluation and the next checkpoint: best and log are ahead of the last one."""
    script = """
import json, os, signal, sys
from pathlib import Path
from sparsefold.recipes import _loop, text
write = _loop._log
def log(path, line):
    write(path, line)
    if line["step"] == 28:
        os.kill(os.getpid(), signal.SIGKILL)
_loop._log = log
words = json.loads(sys.argv[1])
text.run(text.Config(**dict(words, block=tuple(words["block"]))), Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", script, json.dumps(asdict(config())), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] == 20
    assert log(tmp_path)[-1]["step"] == 28
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3')  # a line that the kill cut short
    text.run(config(), tmp_path)
    assert_same_run(tmp_path, uninterrupted("egru")[0])


def test_a_second_ctrl_c_leaves_at_once_and_a_sigterm_after_the_first_does_not(config, stop_at, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    stop_at(22, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted twice; the last checkpoint stands"):
        text.run(config(), tmp_path / "twice")
    assert read_checkpoint(tmp_path / "twice" / "last.safetensors")[1]["progress"]["step"] == 20
    stop_at(22, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after step 23"):
        text.run(config(), tmp_path / "saved")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_returns_at_once_with_the_same_summary(config, uninterrupted, monkeypatch):
    folder, summary = uninterrupted("egru")
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(Stack, "forward", lambda *_: pytest.fail("a finished run computes nothing"))
    assert text.run(config(), folder) == summary
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == content


def test_another_config_in_the_same_folder_is_refused_by_the_changed_keys(config, uninterrupted, tmp_path):
    folder, _ = uninterrupted("egru")
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(
        ValueError, match=r"holds a run with another hidden, lr\. Give the same settings .* or another --out"
    ):
        text.run(config(hidden=32, lr=0.5), folder)
    other = tmp_path / "other.txt"
    other.write_bytes(Path(config().file).read_bytes() + b"and more")
    with pytest.raises(ValueError, match=r"another file\."):
        text.run(config(file=str(other)), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == content


def test_the_same_file_with_another_text_is_refused(config, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(Path(config().file).read_bytes())
    text.run(config("gru", file=str(file), steps=2), tmp_path / "run")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"holds a run with another corpus\."):
        text.run(config("gru", file=str(file), steps=2), tmp_path / "run")


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "text", "folder"])
def test_a_damaged_checkpoint_gets_a_sentence_and_is_left_alone(damage, config, uninterrupted, tmp_path):
    path = tmp_path / "last.safetensors"
    whole = (uninterrupted("egru")[0] / "last.safetensors").read_bytes()
    foreign = len(b'{"__metadata__":{"a":"b"}}').to_bytes(8, "little") + b'{"__metadata__":{"a":"b"}}'
    content = {"empty": b"", "cut": whole[:-100], "foreign": foreign, "text": b"some words, and some more words"}
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(content[damage])
    with pytest.raises(
        ValueError, match=r"(last\.safetensors .*(damaged or foreign|no checkpoint))|no checkpoint .*last\.safetensors"
    ):
        text.run(config(), tmp_path)
    assert damage == "folder" or path.read_bytes() == content[damage]


def test_log_is_one_json_object_for_each_evaluation(config, uninterrupted):
    folder, summary = uninterrupted("egru")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 35, 42, STEPS]
    for line in lines:
        assert set(line) == {"step", "seconds", "train_bits_per_char", "valid_bits_per_char", "event_rate", "density"}
        assert 0 < line["event_rate"] < 1
        assert math.isfinite(line["valid_bits_per_char"])
    density = [line["density"]["1.weight_hh_l0"] for line in lines]
    assert density == sorted(density, reverse=True)
    assert density[0] == 1
    assert density[-1] == 0.5
    assert summary["valid_bits_per_char"] == min(line["valid_bits_per_char"] for line in lines)
    assert summary["config"] == dict(asdict(config()), lr=text.BEST_LR["egru"]), "the resolved config is recorded"
    assert summary["corpus"]["tokens"] > 2
    assert [line["event_rate"] for line in log(uninterrupted("gru")[0])] == [1.0] * 7


def test_the_best_checkpoint_is_the_model_of_the_best_evaluation(config, uninterrupted):
    folder, summary = uninterrupted("egru")
    model, facts = text.load(folder)
    assert not model.training
    assert facts["about"]["config"] == json.loads(json.dumps(summary["config"]))
    assert bits_per_char(model, load_text(config().file).valid) == summary["valid_bits_per_char"]
    last, _ = text.load(folder / "last.safetensors")
    final = log(folder)[-1]["valid_bits_per_char"]
    assert bits_per_char(last, load_text(config().file).valid) == final


def test_facts_are_plain_json_even_before_the_first_evaluation(config, stop_at, tmp_path):
    stop_at(1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        text.run(config(), tmp_path)
    _, facts = read_checkpoint(tmp_path / "last.safetensors")
    json.dumps(facts, allow_nan=False)
    assert facts["progress"]["best"] is None


def test_early_stop_keeps_the_best_and_is_remembered(config, tmp_path, monkeypatch):
    valid = iter([5.0, 4.0, 4.5, 4.0, 3.0])
    monkeypatch.setattr(text, "bits_per_char", lambda *_: next(valid))
    settings = config("gru", patience=2)
    summary = text.run(settings, tmp_path)
    assert summary["stopped_early"] is True
    assert (summary["steps"], summary["best_step"], summary["valid_bits_per_char"]) == (28, 14, 4.0)
    assert text.load(tmp_path)[1]["progress"]["step"] == 14, "a folder means its best model"
    assert text.load(tmp_path / "last.safetensors")[1]["progress"]["step"] == 28
    assert text.run(settings, tmp_path) == summary
    assert next(valid) == 3.0, "the stop was forgotten"
    assert len(log(tmp_path)) == 4


def test_patience_counts_across_a_resume(config, stop_at, tmp_path, monkeypatch):
    valid = iter([4.0, 4.5, 4.0, 3.0])
    monkeypatch.setattr(text, "bits_per_char", lambda *_: next(valid))
    settings = config("gru", patience=2)
    stop_at(15, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        text.run(settings, tmp_path)
    assert text.run(settings, tmp_path)["steps"] == 21


def test_a_diverging_run_says_so_and_leaves_a_good_checkpoint(config, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"diverged; .*last\.safetensors holds the last good state\. .*lower lr"
    ):
        text.run(config(lr=1e6, steps=500, checkpoint_every=1), tmp_path)
    kept = bits(tmp_path)
    assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] >= 1
    assert all(torch.isfinite(v).all() for v in kept.values() if v.is_floating_point())
    assert leftovers(tmp_path) == []


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(config, tmp_path, monkeypatch):
    """The loss itself is finite here: a checkpoint after this step would hold weights that are not."""
    models = []

    def train(trainer: _loop.Trainer, *args: object) -> dict:
        models.append(trainer.model)
        return _loop.train(replace(trainer, penalty=lambda *_: trainer.model[2].bias.sum() * math.nan), *args)

    monkeypatch.setattr(text, "train", train)
    settings = config("gru", steps=3)
    with pytest.raises(FloatingPointError, match=r"norm nan at step 0: training diverged; nothing was saved yet"):
        text.run(settings, tmp_path)
    fresh = text.build(settings, models[0][2].out_features).state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in models[0].state_dict().items())


@pytest.mark.parametrize("run", ["egru", "gru"])
def test_figures_that_are_read_a_step_late_change_nothing(run, config, uninterrupted, stop_at, tmp_path, monkeypatch):
    """As of a GPU: told are the same figures, and no checkpoint is ahead of them, whether training stops on its way or not."""
    expected, summary = uninterrupted(run)
    monkeypatch.setattr(_loop, "_read_late", lambda device: True)
    assert timeless(text.run(config(run), tmp_path / "whole")) == timeless(summary)
    assert_same_run(tmp_path / "whole", expected)
    with monkeypatch.context():
        stop_at(13, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            text.run(config(run), tmp_path / "stopped")
    assert timeless(text.run(config(run), tmp_path / "stopped")) == timeless(summary)
    assert_same_run(tmp_path / "stopped", expected)


def test_a_run_that_diverges_is_seen_before_it_is_saved_though_its_figures_are_late(config, tmp_path, monkeypatch):
    read = []
    take = _loop._Figures.read
    monkeypatch.setattr(_loop._Figures, "read", lambda self: read.append(self.step) or take(self))
    monkeypatch.setattr(_loop, "_read_late", lambda device: True)

    def train(trainer: _loop.Trainer, *args: object) -> dict:
        price = lambda _, step: trainer.model[2].bias.sum() * (math.nan if step == 6 else 0)  # noqa: E731
        return _loop.train(replace(trainer, penalty=price, pruner=None), *args)

    monkeypatch.setattr(text, "train", train)
    with pytest.raises(FloatingPointError, match=r"nan at step 6: training diverged; .* holds the last good state"):
        text.run(config("gru", steps=20, checkpoint_every=4, eval_every=20), tmp_path)
    assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] == 4
    assert all(torch.isfinite(v).all() for v in bits(tmp_path).values() if v.is_floating_point())
    assert read == [0, 1, 2, 3, 4, 5, 6]


def test_a_folder_that_cannot_be_written_is_refused_before_training(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(Stack, "forward", lambda *_: pytest.fail("trained for nothing"))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=rf"cannot write to the run folder {folder}: .* Choose another with --out"):
            text.run(config(), folder)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("trouble", ["full", "interrupted"])
def test_a_checkpoint_is_written_whole_or_not_at_all(trouble, config, tmp_path, monkeypatch):
    def fsync(handle: int) -> None:
        if last.exists() and Path(f"/proc/self/fd/{handle}").resolve().name.startswith(".last.safetensors"):
            if trouble == "full":
                raise OSError(28, "No space left on device")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    last = tmp_path / "last.safetensors"
    monkeypatch.setattr(program.os, "fsync", fsync)
    with pytest.raises((OSError, KeyboardInterrupt)):
        text.run(config(), tmp_path)
    assert read_checkpoint(last)[1]["progress"]["step"] == 10, (
        "the second checkpoint was to fail, and the first to stand"
    )
    assert leftovers(tmp_path) == []


def test_training_in_another_thread_leaves_the_signals_alone(config, tmp_path):
    import threading

    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(text.run(config("gru", steps=2), tmp_path)))
    thread.start()
    thread.join()
    assert summaries[0]["steps"] == 2


@pytest.mark.filterwarnings("ignore:2.weight. 108 rows per gate")  # of the text's own alphabet
def test_learning_happens_with_few_events_and_exactly_the_weights_asked_for(tmp_path):
    """On CPython's text, 150 steps: far below the entropy of single bytes, which no memory is needed for."""
    corpus = load_text()
    share = np.bincount(corpus.valid, minlength=corpus.tokens) / len(corpus.valid)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    summary = text.run(
        text.Config(hidden=64, embedding=32, steps=150, density=0.25, decoder_density=0.5, eval_every=75), tmp_path
    )
    assert 4 < entropy < 5.5
    assert summary["valid_bits_per_char"] < entropy - 0.8
    assert log(tmp_path)[-1]["event_rate"] < 0.15, "0.10 was asked for"
    density = log(tmp_path)[-1]["density"]
    assert density["1.weight_hh_l0"] == 0.25
    assert density["2.weight"] == pytest.approx(0.5, abs=0.02), "half of the blocks, of which the last ones are short"
    weight = load_file(tmp_path / "last.safetensors")["model.1.weight_hh_l0"]
    live = (weight.reshape(-1, 16, 64) != 0).any(1)
    assert live.sum() == round(0.25 * live.numel())
    assert ((weight.reshape(-1, 16, 64) != 0).sum(1)[live] == 16).all(), "a block is kept whole"


# --- the demonstration, in miniature ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    """Module and folder of a demonstration of 16 units and 20 steps on 20 kB of text, and its summary."""
    pytest.importorskip("onnxruntime", reason="the demo's rivals need ONNX Runtime: pip install 'sparsefold[bench]'.")
    pytest.importorskip("matplotlib", reason="the demo's report needs matplotlib: pip install 'sparsefold[report]'.")
    from sparsefold.recipes import demo as module

    folder = tmp_path_factory.mktemp("demo")
    corpus = load_text()
    (folder / "text").write_bytes(bytes(corpus.vocabulary[t] for t in corpus.train[:20_000]))
    small = {"file": str(folder / "text"), "hidden": 16, "embedding": 8, "batch": 4, "window": 8, "eval_every": 10}
    with pytest.MonkeyPatch.context() as patch:
        networks = {key: (label, {**settings, **small}) for key, (label, settings) in module.NETWORKS.items()}
        patch.setattr(module, "NETWORKS", networks)
        patch.setattr(module, "load_text", lambda _: load_text(small["file"]))
        patch.setattr(module.rivals, "PARITY_BYTES", 64)
        patch.setattr(module.rivals, "TIMED_BYTES", 1000)
        patch.setattr(module, "SAMPLE", 40)
        (folder / "run").mkdir()
        (folder / "run" / "mine.txt").write_text("not the demo's")
        summary = module.demo(folder / "run", steps=20)
        yield module, folder / "run", summary


def documented_fields(section: str) -> set[str]:
    """Names in the first column of the table under a heading of docs/results.md; those called optional are left out."""
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    body = page.partition(f"{section}\n")[2].partition("\n#")[0]
    rows = [line.split("|") for line in body.splitlines() if line.startswith("| `")]
    return {name.strip(" `") for _, names, kind, *_ in rows if "optional" not in kind for name in names.split(",")}


def test_the_demo_writes_the_summary_that_is_documented(small_demo):
    module, folder, summary = small_demo
    written = json.loads(
        (folder / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert written == json.loads(json.dumps(summary))
    assert set(written) == documented_fields("## Top level")
    assert set(written["provenance"]) >= documented_fields("## `provenance`")
    assert set(written["corpus"]) == documented_fields("## `corpus`")
    assert list(written["networks"]) == ["gru", "egru", "egru_blocks", "gru_equal"]
    for network in written["networks"].values():
        assert set(network) == documented_fields("## `networks[key]`")
        assert set(network["cost"]) == documented_fields("### `cost`")
        assert [line["step"] for line in network["log"]] == [10, 20]
        assert all(set(line) >= documented_fields("### `log`") for line in network["log"])
    for row in written["rows"]:
        own = {"event_rate", "file_bytes", "cost"} if row["engine"] in module.ROUNDED else set()
        assert set(row) == documented_fields("## `rows[i]`") | own
        assert row["latency_us"]["calls"] == 1000
    players = [(row["network"], row["engine"]) for row in written["rows"]]
    ours = [(key, "sparsefold") for key in written["networks"]]
    rounded = [("egru_blocks", name) for name in ("sparsefold i8", "sparsefold w8a8")]
    rivals = ("ONNX Runtime", "OpenVINO", "torch eager", "torch int8")
    assert players == [*ours, *rounded, *((key, name) for key in ("gru", "gru_equal") for name in rivals)]
    for target in written["targets"]:
        assert set(target) == documented_fields("## `targets[i]`")
    assert set(written["sample"]) == documented_fields("## `sample`")


def test_the_demos_figures_agree_with_each_other(small_demo):
    module, folder, summary = small_demo
    networks, rows = summary["networks"], summary["rows"]
    assert networks["gru"]["event_rate"] == 1
    assert networks["gru"]["bits_per_char_vs_dense"] == 1
    assert networks["egru_blocks"]["density"] == pytest.approx(0.10, abs=0.01)
    assert 0 < networks["egru"]["event_rate"] < 1
    assert networks["egru"]["event_rate"] == pytest.approx(np.mean(networks["egru"]["event_rate_per_unit"]), abs=1e-4)
    assert networks["egru"]["event_rate"] == pytest.approx(np.mean(networks["egru"]["event_rate_over_time"]), abs=0.05)
    assert len(networks["egru"]["raster"]["events"]) == len(networks["egru"]["raster"]["text"]) == 96
    assert networks["gru"]["raster"] is None
    for row in rows:
        for name in ("fastest_rival", "equal_rival"):
            assert row[f"ratio_to_{name}"] == summary[name]["p50"] / row["latency_us"]["p50"]
        if row["engine"] in module.ROUNDED:
            assert row["parity"]["max_abs_error"] <= row["parity"]["bound"] == 2e-2
            assert row["bits_per_char"] == pytest.approx(networks["egru_blocks"]["bits_per_char"], rel=2e-2)
            assert 0 < row["event_rate"] < 1 and row["file_bytes"] < networks["egru_blocks"]["file_bytes"]
        elif row["engine"] != "torch int8":
            assert row["parity"]["max_abs_error"] <= row["parity"]["bound"] == 1e-4
            exact = networks[row["network"]]["bits_per_char"]
            assert row["bits_per_char"] == pytest.approx(exact, rel=1e-4)
    for name, key in (("fastest_rival", "gru"), ("equal_rival", "gru_equal")):
        against = [row["latency_us"]["p50"] for row in rows if row["rival"] and row["network"] == key]
        assert summary[name]["network"] == key and summary[name]["p50"] == min(against)
    assert {row["rival"] for row in rows if row["engine"].startswith("sparsefold")} == {False}
    mask = networks["egru_blocks"]["mask"]
    kept = sum(int(row, 16).bit_count() for row in mask["rows"])
    assert kept / (len(mask["rows"]) * mask["columns"]) == pytest.approx(networks["egru_blocks"]["density"])
    assert networks["egru"]["mask"] is None and networks["egru"]["seeds"] is None
    for key, network in networks.items():
        assert network["file_bytes"] == (folder / f"{key}.sfold").stat().st_size
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "src=" not in page, "self-contained"


def test_the_full_demo_adds_networks_and_seeds_and_begins_with_the_longest(small_demo, monkeypatch, tmp_path):
    module, folder, _ = small_demo
    asked = {}

    def copies(to, trainings, steps):
        asked.update(trainings)
        for key in trainings:
            base = re.sub("_seed[12]$", "", key)
            shutil.copytree(folder / (base if base in module.NETWORKS else "egru_blocks"), to / key)
            yield key

    monkeypatch.setattr(module, "_train_all", copies)
    summary = module.demo(tmp_path, steps=20, full=True)
    added = ["egru_blocks_25", "egru_blocks_5", "egru_decoder"]
    assert list(summary["networks"]) == ["gru", "egru", "egru_blocks", *added, "gru_equal"]
    assert set(asked) == {*summary["networks"], *(f"{key}_seed{n}" for key in module.NETWORKS for n in (1, 2))}
    costs = [settings["hidden"] * (2 if settings["cell"] == "gru" else 1) for settings in asked.values()]
    assert costs == sorted(costs, reverse=True)
    assert asked["egru_seed2"] == {**asked["egru"], "seed": 2}
    for key, network in summary["networks"].items():
        if key in module.NETWORKS:
            assert [other["seed"] for other in network["seeds"]] == [0, 0], "these are copies"
            assert {other["bits_per_char"] for other in network["seeds"]} == {network["bits_per_char"]}
        assert (network["mask"] is None) == (network["density"] == 1)
    assert "seconds" not in " ".join(target["name"] for target in summary["targets"]), "a full one promises no time"
    page = (tmp_path / "report.html").read_text()
    assert page.count("id='mask-") == 4 and page.count("Who speaks when") >= 5


def stand_in(folder: Path, body: str, monkeypatch, module) -> None:
    """The demo's processes run a shell script and train nothing; `$2` is a network's folder, `$2/words` keeps what was said."""
    script = folder / "python"
    first = 'words=$(printf "%s\\n" "$@"); while [ "$1" != --out ]; do shift; done'
    script.write_text(f'#!/bin/sh\n{first}\nmkdir -p "$2"\necho "$words" > "$2/words"\n{body}\n')
    script.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(script))


def test_a_rerun_trains_nothing_anew_and_times_nothing_that_disagrees(small_demo, monkeypatch, tmp_path):
    from sparsefold.cli import main

    module, folder, _ = small_demo
    content = {p: p.read_bytes() for p in folder.rglob("*") if p.suffix in (".safetensors", ".jsonl", ".html", ".json")}
    assert len(content) == 4 * 4 + 2
    stand_in(tmp_path, "exit 0", monkeypatch, module)
    monkeypatch.setattr(module.rivals, "PARITY_BOUND", 0.0)
    monkeypatch.setattr(module.rivals, "race", lambda *_, **__: pytest.fail("timed in spite of a wrong result"))
    with pytest.raises(
        module.rivals.ParityError, match=r"differs from \S+ by \S+ in a logit, the bound is 0e\+00: nothing is timed"
    ):
        module.demo(folder, steps=20)
    monkeypatch.setattr(Stack, "forward", lambda *_: pytest.fail("trained anew"))
    for key in module.NETWORKS:
        said = (folder / key / "words").read_text().splitlines()
        assert said[:3] == ["-m", "sparsefold.cli", "train"]
        assert main(said[2:]) == 0
        (folder / key / "words").unlink()
    assert {p: p.read_bytes() for p in content} == content


def test_a_training_that_fails_is_told_after_its_own_words(small_demo, monkeypatch, tmp_path, capfd):
    from sparsefold.cli import main

    module, _, _ = small_demo
    stand_in(tmp_path, '(sleep 0.3; echo "out of luck") & exit 3', monkeypatch, module)  # words that arrive late
    with pytest.raises(SystemExit) as leave:
        main(["demo", "--out", str(tmp_path / "run"), "--steps", "20"])
    assert re.fullmatch(r"sparsefold: training gru failed with status 3; see the lines above\.", leave.value.code)
    assert re.search(r"^  gru +out of luck$", capfd.readouterr().out, re.M)


def test_ctrl_c_lets_every_training_save_and_names_the_command_that_goes_on(small_demo, monkeypatch, tmp_path, capfd):
    from sparsefold.cli import main

    module, _, _ = small_demo
    body = 'trap \'sleep 0.2; touch "$2/saved"; exit 130\' TERM\ntouch "$2/ready"\nwhile true; do sleep 0.05; done'
    stand_in(tmp_path, body, monkeypatch, module)
    run = tmp_path / "a run"

    def sleep(_: float) -> None:
        if len(list(run.glob("*/ready"))) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert main(["demo", "--out", str(run), "--steps", "20"]) == 130
    assert len(list(run.glob("*/saved"))) == 2
    assert f"sparsefold demo --out '{run}' --steps 20" in capfd.readouterr().err


def test_a_training_that_was_interrupted_ends_the_demo_as_an_interrupt(small_demo, monkeypatch, tmp_path):
    module, _, _ = small_demo
    stand_in(tmp_path, "exit 130", monkeypatch, module)
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; what was trained is saved"):
        module.demo(tmp_path / "run", steps=20)


def test_a_fresh_demo_throws_away_its_own_files_alone(small_demo, monkeypatch):
    module, folder, _ = small_demo
    monkeypatch.setattr(module, "_train_all", lambda *_: (_ for _ in ()).throw(RuntimeError("here")))
    with pytest.raises(RuntimeError, match=r"^here$"):
        module.demo(folder, fresh=True, steps=20)
    assert [p.name for p in folder.rglob("*")] == ["mine.txt"]


def test_what_the_demo_lacks_is_said_before_it_trains(small_demo, monkeypatch, tmp_path):
    module, _, _ = small_demo
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    monkeypatch.setattr(module, "_train_all", lambda *_: pytest.fail("trained for nothing"))
    with pytest.raises(
        ImportError, match=r"the demo needs onnxruntime: pip install 'sparsefold\[train,bench,report\]'"
    ):
        module.demo(tmp_path, steps=20)


# --- a grid of pruned models -----------------------------------------------------------------------------------------


def test_a_grid_runs_every_point_once_and_resumes(tmp_path, capsys):
    from sparsefold.recipes import prune_lm

    (tmp_path / "t.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    words = [
        f"file={tmp_path / 't.txt'}", "cell=gru,lstm", "method=16x1,complementary,narang,rigl,glp", "density=0.5", "hidden=32",
        "embedding=8", "batch=4", "window=8", "steps=12", "prune_every=2", "eval_every=6",
    ]  # fmt: skip
    results = tmp_path / "grid.json"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*blocks are short")
        prune_lm.grid(words, tmp_path / "runs", results)
        first = json.loads(results.read_text())
        assert len(first) == 12 and next(iter(first)) == "gru-32-dense-1-seed0", "narang's dense points come first"
        del first["lstm-32-glp-0.5-seed0"]
        results.write_text(json.dumps(first))
        capsys.readouterr()
        prune_lm.grid(words, tmp_path / "runs", results)
    assert capsys.readouterr().out.startswith("lstm-32-glp-0.5-seed0: ")
    again = json.loads(results.read_text())
    assert len(again) == 12
    for name, point in again.items():
        exact = {"16x1": 0.5, "rigl": 0.5, "glp": 0.5, "complementary": 0.5, "dense": 1.0}.get(
            point["config"]["method"]
        )
        density = point["density"]["1.weight_hh_l0"]
        assert density < 1 if exact is None else density == exact, name
        assert point["macs"]["macs_effective"] >= 0
    timed = prune_lm.clock(["gru-32-dense-1-seed0", "lstm-32-glp-0.5-seed0"], tmp_path / "runs", 40)
    assert list(timed["latency_us"]) == [
        "gru-32-dense-1-seed0",
        "gru-32-dense-1-seed0/ONNX Runtime",
        "lstm-32-glp-0.5-seed0",
    ]
    assert all(latency["p50"] > 0 for latency in timed["latency_us"].values())
    model, facts = prune_lm.load(tmp_path / "runs/gru-32-16x1-0.5-seed0")
    assert int((model.get_parameter("1.weight_hh_l0") != 0).sum()) == 3 * 32 * 16
    assert facts["about"]["recipe"] == "prune_lm"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=narang"], "needs dense=FOLDER"),
        (["density=0"], "density > 0"),
        (["method=16x2"], "method must be one of"),
        (["prune_begin=0.7"], "prune_begin <= prune_until"),
    ],
)
def test_a_point_that_cannot_be_is_refused(words, sentence):
    from sparsefold.recipes import prune_lm

    with pytest.raises(ValueError, match=sentence):
        override(prune_lm.Config(), words)
