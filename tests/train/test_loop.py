"""What the training loop learned for language models: random windows, averages, several processes, whole files."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from processes import free_port, together
from sparsefold.nn import EGRU, Stack
from sparsefold.progress import Progress
from sparsefold.recipes import _checkpoint, _loop
from sparsefold.recipes._average import Average, non_monotonic
from sparsefold.recipes._checkpoint import read_checkpoint
from sparsefold.recipes._distributed import own_device
from sparsefold.recipes._loop import Trainer, train
from sparsefold.recipes._windows import GRAIN, LONGEST, SHORTEST, RandomWindows, Windows, stream_bits
from sparsefold.sparsify import Cubic, Magnitude, Pruner, Staircase
from tolerances import TRAINED_F64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "batch"), [(20_001, 4), (3 * 32 + 4, 3), (900, 1), (5000, 7)])
def test_windows_of_random_length_read_every_stream_once_in_order(tokens, batch):
    windows = RandomWindows(np.arange(tokens), batch, 70, seed=3)
    at, per_stream = 0, (tokens - 1) // batch
    for _ in range(3):
        seen, lengths = [], []
        while True:
            x, y, fresh = windows[at]
            assert fresh == (not seen)
            assert torch.equal(y, x + 1)
            assert windows.span(at) == (sum(lengths), sum(lengths) + len(x))
            lengths.append(len(x))
            seen.append(x)
            at += 1
            if windows[at][2]:
                break
        whole = torch.cat(seen)
        assert len(whole) == per_stream // GRAIN * GRAIN
        for stream in range(batch):
            first = stream * per_stream
            assert whole[:, stream].tolist() == list(range(first, first + len(whole)))
        assert all(n % GRAIN == 0 for n in lengths)
        assert all(SHORTEST <= n <= LONGEST for n in lengths[:-1])
        assert 0 < lengths[-1] <= LONGEST


def test_lengths_are_a_function_of_seed_and_place_alone():
    tokens = np.arange(30_000)

    def lengths(seed: int, order: list[int]) -> dict[int, tuple[int, int]]:
        windows = RandomWindows(tokens, 4, 70, seed)
        return {i: windows.span(i) for i in order}

    late_first, in_order = lengths(0, [900, 3, 250]), lengths(0, [3, 250, 900])
    assert late_first == in_order
    assert lengths(1, [3, 250, 900]) != in_order
    passes = [
        [b - a for a, b in (RandomWindows(tokens, 4, 70, 0).span(i) for i in range(k * 100, k * 100 + 100))]
        for k in (0, 1)
    ]
    assert passes[0] != passes[1], "other borders in another pass"


def test_random_lengths_are_normal_around_their_mean_and_one_in_twenty_around_its_half():
    windows = RandomWindows(np.arange(2_000_000), 1, 70, 0)
    lengths = np.array([b - a for a, b in (windows.span(i) for i in range(20_000))])
    short = lengths < 52  # between the two means
    assert short.mean() == pytest.approx(0.05, abs=0.006)  # 4 standard errors of 20 000 draws
    assert lengths[~short].mean() == pytest.approx(70, abs=0.2)
    assert lengths[~short].std() == pytest.approx(math.sqrt(25 + GRAIN**2 / 12), abs=0.1), "and rounded to eights"
    assert set(lengths) <= set(range(SHORTEST, LONGEST + 1, GRAIN)) | {lengths[-1]}


def test_count_of_windows_and_too_few_tokens():
    assert Windows(np.arange(101), 4, 5).count(2) == 10
    assert Windows(np.arange(101), 4, 5).count(0.01) == 1
    with pytest.raises(ValueError, match=r"too few for 4 streams of at least one window of 32 steps"):
        RandomWindows(np.arange(4 * 32), 4)


# --- reading a whole split -------------------------------------------------------------------------------------------


def small(layer: torch.nn.Module, words: int = 7) -> Stack:
    torch.manual_seed(0)
    return Stack(torch.nn.Embedding(words, 5), layer, torch.nn.Linear(6, words)).double()


def one_by_one(model: Stack, tokens: np.ndarray, first: int, last: int, counted: int) -> float:
    """Nats of the targets from ``counted`` on, of a stream that reads tokens ``first`` ... ``last`` - 1."""
    state, nats = None, 0.0
    for at in range(first, last):
        with torch.no_grad():
            logits, state, _ = model(torch.tensor([[tokens[at]]]), state)
        if at >= counted:
            row = logits[0, 0].numpy()
            nats += np.log(np.exp(row).sum()) - row[tokens[at + 1]]
    return nats


@pytest.mark.parametrize("layer", [torch.nn.LSTM(5, 6), EGRU(5, 6, dropout=0.0)], ids=["lstm", "egru"])
@pytest.mark.parametrize("window", [1, 7, 1000])
def test_one_stream_predicts_every_token_once_as_a_player_does(layer, window):
    model = small(layer).train()
    tokens = np.random.default_rng(0).integers(0, 7, 40)
    bits, rates = stream_bits(model, tokens, window=window)
    assert model.training
    model.eval()
    assert bits == pytest.approx(one_by_one(model, tokens, 0, 39, 0) / 39 / math.log(2), rel=1e-12)
    assert len(rates) == isinstance(layer, EGRU)
    assert rates == stream_bits(model, tokens, window=40)[1] or rates == pytest.approx(
        stream_bits(model, tokens, window=40)[1]
    )


@pytest.mark.parametrize(("tokens", "streams", "warm"), [(200, 3, 10), (101, 4, 0), (50, 16, 5), (13, 2, 6), (2, 4, 1)])
def test_many_streams_predict_every_token_once_after_warming_up(tokens, streams, warm):
    model = small(torch.nn.GRU(5, 6)).eval()
    sequence = np.random.default_rng(1).integers(0, 7, tokens)
    pieces = max(1, min(streams, (tokens - 1) // (2 * warm + 1)))
    steps = math.ceil((tokens - 1 + (pieces - 1) * warm) / pieces)
    nats, covered = 0.0, []
    for piece in range(pieces):
        first = piece * (steps - warm)
        counted, last = first + (warm if piece else 0), min(first + steps, tokens - 1)
        covered += range(counted, last)
        nats += one_by_one(model, sequence, first, last, counted)
    assert covered == list(range(tokens - 1)), "every target once"
    bits, _ = stream_bits(model, sequence, streams, warm, window=40)
    assert bits == pytest.approx(nats / (tokens - 1) / math.log(2), rel=1e-12)


def test_a_split_without_a_target_is_refused():
    with pytest.raises(ValueError, match=r"1 tokens predicts nothing"):
        stream_bits(small(torch.nn.GRU(5, 6)), np.zeros(1, np.int64))


# --- averages --------------------------------------------------------------------------------------------------------


def test_the_trigger_is_the_papers():
    """Algorithm 1 of arXiv 1708.02182 with n = 3, by hand: v > min over logs[0 … t − n − 1]."""
    values = [100.0, 90.0, 80.0, 85.0, 84.0, 83.0, 82.0, 81.0, 79.0]
    fired = [non_monotonic(values[:t], v, 3) for t, v in enumerate(values)]
    # t = 4: 84 > min(100)? no; t = 5: 83 > min(100, 90)? no; t = 6: 82 > min(100, 90, 80) = 80: yes; t = 7 yes; t = 8: 79 no
    assert fired == [False, False, False, False, False, False, True, True, False]
    assert [non_monotonic([5.0, 4.0], 6.0, n) for n in (0, 1, 2)] == [True, True, False]


def test_an_average_is_the_mean_over_steps_and_leaves_the_weights_alone():
    layer = torch.nn.Linear(2, 1).double()
    average = Average(layer)
    seen = []
    for step in range(5):
        layer.weight.data.fill_(float(step**2))
        average.active = step >= 1
        average.update()
        seen.append(float(step**2))
    with average.in_place():
        assert layer.weight[0, 0].item() == pytest.approx(np.mean(seen[1:]), rel=1e-15)
    assert layer.weight[0, 0].item() == 16
    other = Average(layer)
    other.load({k: v.clone() for k, v in average.tensors().items()})
    for a in (average, other):
        a.update()
    assert other.steps == average.steps == 5
    assert torch.equal(*(a.tensors()["mean.weight"] for a in (average, other)))
    average.restart()
    average.update()
    with average.in_place():
        assert layer.weight[0, 0].item() == 16, "the mean of one step"


# --- a staircase of densities ----------------------------------------------------------------------------------------


def test_a_staircase_falls_as_cubics_do_and_holds_each_density():
    stairs = Staircase((0.5, 0.1), (Cubic(10, 20, 2), Cubic(40, 50, 5)))
    assert stairs.end == 50
    for step in range(60):
        if step <= 10:
            wanted = 1.0
        elif step < 20:
            wanted = 0.5 + 0.5 * ((20 - step) / 10) ** 3
        elif step <= 40:
            wanted = 0.5
        elif step < 50:
            wanted = 0.1 + 0.4 * ((50 - step) / 10) ** 3
        else:
            wanted = 0.1
        assert stairs.density(step, 0.0) == pytest.approx(wanted, rel=1e-12)
        assert stairs.density(step, 0.3) == pytest.approx(max(wanted, 0.3), rel=1e-12)
        assert stairs.due(step) == (step in (10, 12, 14, 16, 18, 20, 40, 45, 50))
    linear = torch.nn.Linear(10, 10)
    pruner = Pruner(linear, {"weight": Magnitude(0.1)}, stairs)
    density = {}
    for step in range(1, 60):
        pruner.step()
        density[step] = pruner.density()["weight"]
    assert (density[9], density[30], density[55]) == (1.0, 0.5, 0.1)


@pytest.mark.parametrize(
    ("densities", "stairs"),
    [((0.5, 0.5), (Cubic(0, 1), Cubic(1, 2))), ((0.1, 0.5), (Cubic(0, 1), Cubic(1, 2))), ((0.5,), ()), ((), ())],
)
def test_a_staircase_that_does_not_fall_is_refused(densities, stairs):
    with pytest.raises(ValueError, match=r"^a staircase has densities"):
        Staircase(densities, stairs)
    with pytest.raises(ValueError, match=r"^a stair begins at or after the end"):
        Staircase((0.5, 0.1), (Cubic(0, 10), Cubic(9, 20)))


# --- runs ------------------------------------------------------------------------------------------------------------


def trainer(steps: int = 40, average: bool = False, pruned: bool = False, **changes: object) -> Trainer:
    """Two event layers with float64 weights on tokens of which a bigram tells half."""
    random = np.random.default_rng(0)
    table, tokens = random.integers(0, 5, 11), [0]
    for _ in range(6000):
        tokens.append(int((table[tokens[-1]] * 2 + random.integers(0, 2)) % 11))
    sequence = np.array(tokens)
    torch.manual_seed(5)
    model = Stack(torch.nn.Embedding(11, 6), EGRU(6, 8, 2), torch.nn.Linear(8, 11)).double()
    return Trainer(
        **{
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
            "windows": RandomWindows(sequence[:5000], 4, 70, 1),
            "steps": steps,
            "lr": lambda step: 0.5,
            "penalty": lambda activity, step: activity.penalty(0.2, 10.0),
            "evaluate": lambda: stream_bits(model, sequence[5000:], 4, 8)[0],
            "clip": 1.0,
            "pruner": Pruner(model, {"1.weight_hh_l*": Magnitude(0.3)}, Cubic(5, 20, 5)) if pruned else None,
            "eval_every": 4,
            "checkpoint_every": 7,
            "about": {"recipe": "none"},
            **({"average": averaged(model)} if average else {}),
            **changes,
        }
    )


def averaged(model: Stack) -> Average:
    """From the first step on."""
    average = Average(model)
    average.active = True
    return average


def tensors(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def test_averaging_begins_where_validation_stops_falling_and_is_what_is_kept(tmp_path):
    values = iter([5.0, 4.0, 3.0, 4.5, 3.5, 3.2, 2.0, 2.5, 2.6, 2.7])
    t = trainer(evaluate=lambda: next(values))
    t.average = Average(t.model, 1)
    evaluated = []
    keep = t.evaluate
    t.evaluate = lambda: evaluated.append(t.model[2].weight.detach().clone()) or keep()
    history = []
    step = t.optimizer.step
    t.optimizer.step = lambda: (step(), history.append(t.model[2].weight.detach().clone()))[0]
    train(t, tmp_path, "t")
    # 4.5 > min(5, 4): the fourth evaluation, after step 16, begins the average.
    for i, seen in enumerate(evaluated):
        at = 4 * (i + 1)
        wanted = history[at - 1] if at <= 16 else torch.stack(history[16:at]).mean(0)
        torch.testing.assert_close(seen, wanted, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(tensors(tmp_path, "best")["model.2.weight"], evaluated[6], rtol=0, atol=0)
    torch.testing.assert_close(tensors(tmp_path)["model.2.weight"], history[-1], rtol=0, atol=0)


@pytest.mark.parametrize("stops", [[3], [16, 18, 33]], ids=str)
def test_a_run_with_average_and_pruning_resumes_with_the_same_bits(stops, tmp_path, monkeypatch):
    whole = train(trainer(average=True, pruned=True), tmp_path / "whole", "t")
    for stop in stops:

        def strike(self: Progress, done: int, note: str = "", stop: int = stop) -> None:
            if done == stop:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Progress, "update", strike)
        with pytest.raises(KeyboardInterrupt, match=rf"^stopped after step {stop + 1}; everything is saved"):
            train(trainer(average=True, pruned=True), tmp_path / "parts", "t")
    monkeypatch.undo()
    parts = train(trainer(average=True, pruned=True), tmp_path / "parts", "t")
    assert {**whole, "seconds": 0} == {**parts, "seconds": 0}
    for name in ("last", "best"):
        got, wanted = tensors(tmp_path / "parts", name), tensors(tmp_path / "whole", name)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    assert int(tensors(tmp_path / "parts")["average.steps"]) > 0, "the average is a part of what was compared"
    log = [(tmp_path / f / "log.jsonl").read_text().splitlines() for f in ("whole", "parts")]
    assert [{**json.loads(a), "seconds": 0} for a in log[0]] == [{**json.loads(a), "seconds": 0} for a in log[1]]


def test_snapshots_are_kept_and_the_best_is_looked_for_once_the_network_is_sparse(tmp_path):
    t = trainer(pruned=True, snapshots={10: "early", 21: "late"}, best_from=20, eval_every=8)
    train(t, tmp_path, "t")
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [8, 10, 16, 21, 24, 32, 40]
    early, late = (tensors(tmp_path, name) for name in ("early", "late"))
    assert (late["model.1.weight_hh_l0"] != 0).double().mean() == 20 / 64, "of each gate 0.3, rounded up"
    assert (early["model.1.weight_hh_l0"] != 0).double().mean() > 0.5
    facts = read_checkpoint(tmp_path / "early.safetensors")[1]
    assert facts["progress"]["step"] == 10
    assert facts["about"]["valid"] == pytest.approx(
        json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])["valid_bits_per_char"]
    )
    assert read_checkpoint(tmp_path / "best.safetensors")[1]["progress"]["step"] >= 20


def test_perplexity_is_two_to_the_bits(tmp_path):
    bits = train(trainer(8), tmp_path / "bits", "t")
    words = train(trainer(8, unit="perplexity"), tmp_path / "words", "t")
    for what in ("valid", "train"):
        assert words[f"{what}_perplexity"] == pytest.approx(2 ** bits[f"{what}_bits_per_char"])
    assert json.loads((tmp_path / "words" / "log.jsonl").read_text().splitlines()[0]).keys() >= {"valid_perplexity"}


def test_a_checkpoint_is_due_after_minutes_too_and_changes_nothing(tmp_path, monkeypatch):
    saved = []
    keep = _loop.tensors_of
    monkeypatch.setattr(_loop, "tensors_of", lambda *a: saved.append(1) or keep(*a))
    train(trainer(12, checkpoint_every=1000, checkpoint_minutes=0.0), tmp_path / "often", "t")
    assert len(saved) == 12
    train(trainer(12, checkpoint_every=1000), tmp_path / "once", "t")
    assert len(saved) == 13
    often, once = (tensors(tmp_path / f) for f in ("often", "once"))
    assert all(torch.equal(often[k], once[k]) for k in once)


def test_a_full_disk_gets_a_sentence_and_the_checkpoint_before_it_is_whole(tmp_path, monkeypatch):
    write, written = _checkpoint.write_atomically, []

    def full(path: Path, data: bytes) -> None:
        if path.name == "last.safetensors":
            written.append(1)
            if len(written) == 2:
                raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(_checkpoint, "write_atomically", full)
    with pytest.raises(
        OSError, match=r"No space left on device: [\d,]+ bytes were not written; last.safetensors is still whole"
    ):
        train(trainer(), tmp_path, "t")
    assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] == 7
    train(trainer(), tmp_path, "t")  # room was made
    assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] == 40


def test_a_checkpoint_of_version_1_is_read_and_goes_on(tmp_path, monkeypatch):
    """Version 1 had no list of validations; of everything else it was the same."""
    monkeypatch.setattr(_checkpoint, "CHECKPOINT_VERSION", 1)
    dumps = json.dumps

    def old(what: dict, **options: object) -> str:
        if "progress" in what:
            what = {**what, "progress": {k: v for k, v in what["progress"].items() if k != "valid"}}
        return dumps(what, **options)

    monkeypatch.setattr(_checkpoint.json, "dumps", old)
    monkeypatch.setattr(
        Progress, "update", lambda self, done, note="": done == 20 and signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        train(trainer(), tmp_path / "old", "t")
    monkeypatch.undo()
    assert "valid" not in read_checkpoint(tmp_path / "old" / "last.safetensors")[1]["progress"]
    train(trainer(), tmp_path / "old", "t")
    train(trainer(), tmp_path / "new", "t")
    old_bits, new_bits = tensors(tmp_path / "old"), tensors(tmp_path / "new")
    assert all(torch.equal(old_bits[k], new_bits[k]) for k in new_bits)


def test_a_checkpoint_of_a_version_to_come_is_refused_by_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "CHECKPOINT_VERSION", 3)
    train(trainer(4), tmp_path, "t")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"no checkpoint that this version of sparsefold reads \(it says version 3\)"):
        train(trainer(4), tmp_path, "t")


def test_lines_of_the_log_go_to_tensorboard_if_asked_for(tmp_path, monkeypatch):
    shown, purged = [], []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int) -> None:
            purged.append((folder.name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            shown.append((name, step))

        def flush(self) -> None: ...
        def __enter__(self) -> SummaryWriter:
            return self

        def __exit__(self, *_: object) -> None: ...

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(trainer(8, pruned=True), tmp_path / "quiet", "t")
    assert not shown
    train(trainer(8, pruned=True, tensorboard=True), tmp_path / "shown", "t")
    assert purged == [("tensorboard", 1)]
    assert ("valid_bits_per_char", 4) in shown
    assert ("density/1.weight_hh_l0", 8) in shown
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsefold\[tensorboard\]'"):
        train(trainer(8, tensorboard=True), tmp_path / "missing", "t")


def test_products_in_bfloat16_train_weights_of_float32(tmp_path):
    losses = []
    for autocast in (None, torch.bfloat16):
        t = trainer(30, autocast=autocast)
        t.model.float()
        losses.append(train(t, tmp_path / str(autocast), "t")["train_bits_per_char"])
    assert all(
        v.dtype == torch.float32 for k, v in tensors(tmp_path / "torch.bfloat16").items() if k.startswith("model.")
    )
    assert losses[0] != losses[1], "something was narrow"
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # 2⁻⁸ for each product, over 30 steps


def test_devices_that_are_not_there_get_a_sentence():
    assert own_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device is cpu, cuda or cuda:N; got 'toaster'"):
        own_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^device=cuda was asked for, but torch finds no GPU"):
            own_device("cuda")


# --- several processes -----------------------------------------------------------------------------------------------

TORCHRUN = """
import sys
from pathlib import Path
import torch
sys.path[:0] = [{tests!r}, str(Path({tests!r}).parent)]
torch.set_num_threads(1)
from test_loop import trainer
from sparsefold.recipes._loop import train
train(trainer(20, pruned=True, average=True), Path({folder!r}), "t")
"""


def in_parts(folder: Path, stop: int = 0) -> str:
    """The work of one process of two; the second meets Ctrl-C after step ``stop``."""
    if stop and os.environ["RANK"] == "1":
        Progress.update = lambda self, done, note="": done == stop and signal.raise_signal(signal.SIGINT)
    train(trainer(20, pruned=True, average=True), folder, "t")
    return "done"


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """The folder of a run by two processes that torchrun started."""
    folder = tmp_path_factory.mktemp("two")
    program = folder / "program.py"
    program.write_text(TORCHRUN.format(tests=str(Path(__file__).parent), folder=str(folder / "run")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(program)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_two_processes_with_half_the_batch_equal_one_with_the_whole(torchrun, tmp_path):
    train(trainer(20, pruned=True, average=True), tmp_path, "t")
    one, two = tensors(tmp_path), tensors(torchrun)
    for name in one:
        if name.startswith(("model.", "average.")):
            torch.testing.assert_close(two[name], one[name], rtol=TRAINED_F64, atol=TRAINED_F64 / 1000)
    assert two["state.1.0"].shape[1] == two["process.1.state.1.0"].shape[1] == one["state.1.0"].shape[1] // 2
    both = torch.cat([two["state.1.1"], two["process.1.state.1.1"]], 1)
    torch.testing.assert_close(both, one["state.1.1"], rtol=TRAINED_F64, atol=TRAINED_F64 / 1000)
    lines = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (tmp_path, torchrun)]
    for a, b in zip(*lines, strict=True):
        for what in ("train_bits_per_char", "valid_bits_per_char", "event_rate"):  # the rate of all streams
            assert b[what] == pytest.approx(a[what], rel=TRAINED_F64)


def test_a_signal_that_one_of_two_processes_gets_stops_both_and_they_resume_with_the_same_bits(torchrun, tmp_path):
    said = f"KeyboardInterrupt: stopped after step 10; everything is saved in {tmp_path}."
    assert together(in_parts, tmp_path, 9) == [said] * 2
    assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] == 10
    assert together(in_parts, tmp_path) == ["done"] * 2
    whole, parts = tensors(torchrun), tensors(tmp_path)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    with pytest.raises(ValueError, match=r"holds a run with another processes"):
        train(trainer(20, pruned=True, average=True), tmp_path, "t")


def trains_often(folder: Path) -> str:
    for run in range(8):
        train(trainer(2), folder / str(run), "t")
    return "done"


def test_processes_train_together_as_often_as_they_like(tmp_path):
    assert together(trains_often, tmp_path) == ["done"] * 2
    assert len(list(tmp_path.glob("*/last.safetensors"))) == 8


def test_streams_that_processes_cannot_share_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_loop.processes, "count", lambda: 3)
    with pytest.raises(ValueError, match=r"^batch=4 streams cannot be shared evenly by 3 processes"):
        train(trainer(4), tmp_path, "t")
