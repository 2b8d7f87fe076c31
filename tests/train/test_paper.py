"""The full-size recipe in miniature: shares of the budget, stops in time, what goes to another machine, and its results."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsefold.cli import main
from sparsefold.data import load_corpus, load_text
from sparsefold.engine import Engine
from sparsefold.language import evaluate
from sparsefold.nn import EGRU, Stack
from sparsefold.program import Program
from sparsefold.recipes import describe, lm, paper, rivals
from sparsefold.recipes._checkpoint import Progressed, read_checkpoint, read_transfer, transfer_facts, write_transfer
from sparsefold.recipes._windows import stream_bits

pytestmark = pytest.mark.filterwarnings("ignore:.*rows per gate")
STEPS = 12
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A page of text as a corpus of words."""
    corpus, folder = load_text(), tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(bytes(corpus.vocabulary[t] for t in corpus.train[5000:25_000]))
    return str(folder / "a.txt")


@pytest.fixture(scope="module")
def config(text):
    """Three layers of 16, 16 and 8 units."""
    more = "batch=4 bptt=16 random_bptt=false checkpoint_minutes=60 cutoffs="
    return paper.Config(
        corpus=text,
        steps=STEPS,
        hidden=(16, 16, 8),
        density=0.2,
        decoder_density=0.2,
        lr=0.01,
        more=more,
        rivals=False,
        calls=200,
    )


@pytest.fixture(scope="module", autouse=True)
def short():
    """Fewer tokens are counted and compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describe, "SAMPLE", 200)
        patch.setattr(describe, "PARITY", 40)
        yield


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory):
    """Folder and result of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, paper.run(config, folder)


def trainer_of(config, steps):
    found = paper.settings(replace(config, steps=steps))
    corpus = load_corpus(found.corpus, "word")
    return lm.trainer_of(paper.scheduled(found, corpus, Path("/nowhere"), CPU), corpus, CPU)


def tensors(path):
    """Tensors of a checkpoint but for what says how long it took."""
    return read_checkpoint(path)[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- shares of the budget --------------------------------------------------------------------------------------------


def test_the_same_recipe_is_short_or_long(config):
    one, ten = trainer_of(config, 100), trainer_of(config, 1000)
    for step in (0, 3, 10, 20, 50, 70, 99):
        assert one.lr(step) == pytest.approx(ten.lr(10 * step)), "of the learning rate"
    assert ten.lr(100) == max(map(ten.lr, range(1000))), "its peak is a tenth of the way in"

    def hinge(trainer, step):
        activity = type("Activity", (), {"rates": [0], "penalty": lambda self, target, *_: target})()
        return trainer.penalty(activity, step)

    for step in (0, 5, 29, 30, 60):
        assert hinge(one, step) == pytest.approx(hinge(ten, 10 * step)), "of the target of events"
    assert hinge(ten, 0) == pytest.approx(0.3)
    assert hinge(ten, 300) == pytest.approx(0.1)
    for trainer, steps in ((one, 100), (ten, 1000)):
        cubic = trainer.pruner._schedule
        assert (cubic.begin, cubic.end, cubic.every) == (0.1 * steps, 0.5 * steps, max(1, steps // 125))
        assert (trainer.eval_every, trainer.best_from) == (steps // 10, 0.5 * steps)
    assert one.pruner._schedule.density(35, 0.2) == pytest.approx(ten.pruner._schedule.density(350, 0.2))


def test_minutes_become_steps_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "pace", lambda *_: (0.5, 3.0))
    found = paper.settings(replace(config, steps=None, budget=2.0))
    planned = paper.scheduled(found, load_corpus(found.corpus, "word"), tmp_path, CPU)
    assert planned.steps == (2 * 60 - 10 * 3) / 0.5
    assert planned.eval_every == planned.steps / 10


def test_the_full_size_is_that_of_the_paper():
    found = paper.settings(paper.Config())
    assert (found.hidden, found.embedding, found.tied, found.output) == ((1350, 1350, 750), 750, True, "state")
    assert found.minutes == 22.0
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in lm.build(found, 10_000).named_parameters() if "weight" in name}
    layers = sum(n for name, n in sizes.items() if name.endswith("_l0"))
    assert found.density * layers + sum(sizes.values()) - layers <= 0.15 * sum(sizes.values())


def test_a_text_of_few_words_has_fewer_clusters(config):
    found = paper.settings(replace(config, more="cutoffs=30x300x3000"))
    corpus = load_corpus(config.corpus, "word")
    assert 300 < corpus.tokens < 3000
    assert paper.scheduled(found, corpus, Path("/nowhere"), CPU).cutoffs == (30, 300)
    few = load_corpus(config.corpus, "byte")
    assert (
        paper.scheduled(
            paper.settings(paper.Config(corpus=config.corpus, level="byte", steps=9)), few, Path("/nowhere"), CPU
        ).cutoffs
        == ()
    )


# --- until -----------------------------------------------------------------------------------------------------------


def test_a_run_stops_in_time_and_goes_on_with_the_same_bits(config, whole_run, tmp_path, monkeypatch):
    clock, stops = time.time, 0
    while stops < 9:  # each time the moment comes three steps later than the clock says
        steps = iter(range(10**6))
        monkeypatch.setattr(time, "time", lambda steps=steps: 1000.0 if next(steps) < 3 else clock())
        try:
            paper.run(replace(config, until="2000"), tmp_path)
            break
        except KeyboardInterrupt as stop:
            stops += 1
            assert str(stop).startswith("stopped after step ")
            assert ", before " in str(stop)
            assert (tmp_path / "last.safetensors").exists()
    monkeypatch.undo()
    assert 3 < stops < 9, "it was stopped several times"
    folder, expected = whole_run
    for name in ("last.safetensors", "best.safetensors"):
        assert same(tensors(tmp_path / name), tensors(folder / name))
    assert json.loads((tmp_path / "paper.json").read_text())["test_bits"] == expected["test_bits"]


def test_the_command_says_how_to_go_on(config, tmp_path, capsys):
    until = f"until={time.time() + 2:.2f}"
    words = [f"corpus={config.corpus}", "steps=100000", "hidden=8x8", f"more={config.more}", until]
    assert main(["train", "ptb-paper", *words, "--out", str(tmp_path)]) == 130
    err = capsys.readouterr().err
    assert ", before " in err
    assert "Run the same command again to go on: sparsefold train ptb-paper" in err
    assert time.time() < float(until.removeprefix("until=")), "in good time"
    time.sleep(max(0.0, float(until.removeprefix("until=")) - time.time()) + 0.1)
    assert main(["train", "ptb-paper", *words, "--out", str(tmp_path)]) == 2
    assert "has passed. Give a later moment, or leave it out" in capsys.readouterr().err


def test_a_time_of_day_is_the_next_one():
    now = datetime(2025, 3, 4, 14, 30, 5).timestamp()
    assert paper.moment("14:31", now) == datetime(2025, 3, 4, 14, 31).timestamp()
    assert paper.moment("14:30", now) == datetime(2025, 3, 5, 14, 30).timestamp()
    assert paper.moment("", now) == math.inf
    assert paper.moment(f"{now + 5:.0f}", now) == now + 5
    with pytest.raises(ValueError, match="has passed"):
        paper.moment("100", now)


# --- what goes to another machine ------------------------------------------------------------------------------------


def test_another_machine_goes_on_from_live_weights_and_second_moments(config, whole_run, tmp_path):
    """Stopped by hand once pruned, moved, and gone on with: all that the file holds is there, rounded to bfloat16."""
    trainer = trainer_of(config, STEPS)
    last = tensors(whole_run[0] / "last.safetensors")
    at = read_transfer(whole_run[0] / "transfer.safetensors", trainer)
    assert (at.step, at.best) == (STEPS, None)
    assert trainer.pruner.state_dict()["step"] == STEPS
    parameters = dict(trainer.model.named_parameters())
    masks = trainer.pruner.masks
    assert set(masks) >= {"0.weight", "2.weight_ih_l0", "6.weight_hh_l0"}
    index = {id(p): i for i, p in enumerate(p for g in trainer.optimizer.param_groups for p in g["params"])}
    for name, p in parameters.items():
        expected, kind = last[f"model.{name}"], torch.bfloat16 if p.dim() > 1 else torch.float32
        assert torch.equal(p.detach(), expected.to(kind).float())
        if not p.requires_grad:
            continue
        state = trainer.optimizer.state[p]
        assert not state["exp_avg"].any(), "first moments begin at zero"
        moment = last[f"optimizer.{index[id(p)]}.exp_avg_sq"].to(kind).float()
        if name in masks:
            assert torch.equal(masks[name], last[f"pruner.masks.{name}"])
            moment = moment * masks[name]
        assert torch.equal(state["exp_avg_sq"], moment)
        assert float(state["step"]) == STEPS


def test_training_goes_on_elsewhere_for_the_steps_that_are_left(config, whole_run, tmp_path):
    trainer = trainer_of(config, STEPS)
    read_transfer(whole_run[0] / "transfer.safetensors", trainer)
    started = tmp_path / "moved.safetensors"
    write_transfer(started, trainer, Progressed(step=STEPS - 3, loss_mean=7.0))
    there = replace(config, steps=None, start=str(started), precision="float32")
    folder = tmp_path / "there"
    result = paper.run(there, folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 12]
    assert result["training"]["steps"] == STEPS
    assert result["density_of_all"] == pytest.approx(0.2, abs=0.05)
    assert paper.run(there, folder)["test_bits"] == result["test_bits"], "what began from it goes on in its folder"
    with pytest.raises(ValueError, match=r"is of a run of 12 steps, which it goes on with\. Leave steps out"):
        paper.run(replace(there, steps=5), tmp_path / "other")
    with pytest.raises(ValueError, match=r"comes from a training with another lr, density\. Give the settings"):
        paper.run(replace(there, density=0.1, lr=0.02), tmp_path / "other")
    with pytest.raises(ValueError, match=r"another start"):
        paper.run(replace(there, start=str(whole_run[0] / "transfer.safetensors")), folder)
    assert not (tmp_path / "other").exists()


def test_a_run_that_is_done_can_be_carried_home(config, whole_run, tmp_path):
    there = replace(config, start=str(whole_run[0] / "transfer.safetensors"))
    result = paper.run(there, tmp_path)
    assert result["training"]["valid_perplexity"] is None, "nothing was trained or evaluated"
    assert (result["start"]["step"], result["start"]["device"]) == (STEPS, "cpu")
    assert result["test_bits"] == pytest.approx(whole_run[1]["test_bits"], abs=0.3)


def test_the_full_size_is_at_most_fifty_megabytes_at_thirty_percent(text, tmp_path):
    """31.7 M parameters of which 30 % live, written without training them."""
    corpus = load_corpus(text, "word")
    rest = [f"word{i}" for i in range(10_000 - corpus.tokens)]
    corpus = replace(corpus, known=replace(corpus.known, values=(*corpus.known.values, *rest)))
    whole = paper.Config(corpus=text, steps=1000, decoder_density=0.12, more="cutoffs=")
    found = replace(paper.settings(whole), eval_every=100)
    trainer = lm.trainer_of(found, corpus, CPU)
    parameters = list(trainer.model.parameters())
    assert sum(p.numel() for p in parameters) / 1e6 == pytest.approx(31.7, abs=0.1)
    random = np.random.default_rng(0)
    masks = {}
    for name, mask in trainer.pruner.masks.items():
        live = torch.from_numpy(random.random((-(-mask.shape[0] // 16), mask.shape[1])) < 0.2996)
        masks[name] = live.repeat_interleave(16, 0)[: mask.shape[0]]
    trainer.pruner.load_state_dict({"step": 400, "masks": masks})
    for p in parameters:
        if p.requires_grad:
            trainer.optimizer.state[p] = {"step": torch.tensor(400.0), "exp_avg_sq": torch.ones_like(p)}
    assert 0.295 < paper.live_share(trainer) < paper.TRANSFERRED + 0.002
    size = write_transfer(tmp_path / "t", trainer, Progressed(step=400))
    assert size == (tmp_path / "t").stat().st_size
    assert size <= 50e6
    assert read_transfer(tmp_path / "t", trainer).step == 400


def test_nothing_is_written_before_few_weights_live(config, tmp_path):
    paper.run(replace(config, density=0.5, decoder_density=0.5), tmp_path)
    assert not (tmp_path / "transfer.safetensors").exists()
    with pytest.raises(ValueError, match=r"holds second moments; the optimiser has none"):
        write_transfer(tmp_path / "t", trainer_of(config, STEPS), Progressed(step=1))


def damaged(source, target, change):
    with safe_open(str(source), "pt") as file:
        meta = dict(file.metadata())
    found = load_file(source)
    facts = json.loads(meta["facts"])
    change(found, facts, meta)
    save_file(found, target, {**meta, "facts": json.dumps(facts)} if "facts" in meta else meta)


HH = "2.weight_hh_l0"
DAMAGES = {
    "nan": (lambda t, f, m: t[f"weight.{HH}"].fill_(math.nan), f"weight.{HH} holds a number that is not finite"),
    "negative": (lambda t, f, m: t[f"moment.{HH}"].fill_(-1), "or a negative moment"),
    "fewer": (lambda t, f, m: t.update({f"weight.{HH}": t[f"weight.{HH}"][1:].clone()}), f"weight.{HH} is "),
    "wider": (lambda t, f, m: t.update({f"weight.{HH}": t[f"weight.{HH}"].float()}), "to be .* of torch.bfloat16"),
    "bits": (
        lambda t, f, m: t.update({f"live.{HH}": t[f"live.{HH}"][1:].clone()}),
        "not a bit for each of 768 weights",
    ),
    "otherbits": (lambda t, f, m: t[f"live.{HH}"].fill_(255), f"weight.{HH} is "),
    "missing": (lambda t, f, m: t.pop(f"live.{HH}"), f"live.{HH} is in one of the two alone"),
    "more": (lambda t, f, m: t.update({"odd": torch.zeros(1)}), "odd is in one of the two alone"),
    "step": (lambda t, f, m: f["progress"].update(step=STEPS + 1), "its facts are not as they should be"),
    "nostep": (lambda t, f, m: f.pop("progress"), "its facts are not as they should be"),
    "loss": (lambda t, f, m: f["progress"].update(loss_mean="x"), "its facts are not as they should be"),
    "list": (lambda t, f, m: f.update(about=[]), "its facts are not as they should be"),
    "version": (lambda t, f, m: m.update(sparsefold_transfer="9"), "its version is 9"),
    "foreign": (lambda t, f, m: m.clear(), "it says nothing of the kind"),
    "text": (lambda t, f, m: f["about"]["corpus"].update(sha256="0"), "another text"),
    "words": (lambda t, f, m: f["about"].update(vocabulary=[]), "another vocabulary"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_file_is_refused(name, config, whole_run, tmp_path):
    change, sentence = DAMAGES[name]
    damaged(whole_run[0] / "transfer.safetensors", tmp_path / "t", change)
    trainer = trainer_of(config, STEPS)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        read_transfer(tmp_path / "t", trainer)
    assert same(before, trainer.model.state_dict())
    assert not trainer.optimizer.state


def test_a_file_from_before_a_setting_existed_is_read(config, whole_run, tmp_path):
    def older(t, f, m):
        del f["about"]["config"]["cutoffs"], f["about"]["config"]["decoder_frequency"]

    damaged(whole_run[0] / "transfer.safetensors", tmp_path / "t", older)
    assert read_transfer(tmp_path / "t", trainer_of(config, STEPS)).step > 0
    other = replace(config, more=f"{config.more} decoder_frequency=0.5")
    with pytest.raises(ValueError, match="another decoder_frequency"):
        read_transfer(tmp_path / "t", trainer_of(other, STEPS))


def test_what_is_no_file_of_ours_is_refused(whole_run, tmp_path):
    with pytest.raises(ValueError, match=r"there is no transfer checkpoint"):
        transfer_facts(tmp_path)
    with pytest.raises(ValueError, match=r"it is the checkpoint of a run"):
        transfer_facts(whole_run[0] / "last.safetensors")
    cut = (whole_run[0] / "transfer.safetensors").read_bytes()[:-5]
    for data in (b"", b"\x80\x04pickle", cut):
        (tmp_path / "t").write_bytes(data)
        with pytest.raises(ValueError, match=r"is not a readable transfer checkpoint"):
            transfer_facts(tmp_path / "t")


# --- results ---------------------------------------------------------------------------------------------------------


def test_the_result_has_quality_counts_and_time(config, whole_run):
    folder, result = whole_run
    assert json.loads((folder / "paper.json").read_text()) == json.loads(json.dumps(result))
    assert result["schema"] == "sparsefold-paper/1"
    corpus, (model, _) = load_corpus(config.corpus, "word"), lm.load(folder)
    bits, rates = stream_bits(model, corpus.test)
    assert (result["test_bits"], result["test_event_rates"]) == (bits, rates)
    assert result["test_perplexity"] == 2**bits
    assert len(rates) == 3
    widths = (8, *config.hidden)
    weights = sum(3 * h * (i + h) for i, h in pairwise(widths)) + 8 * corpus.tokens
    assert result["macs"]["macs_dense"] == weights, "embedding and decoder are counted"
    assert result["fewer_macs"] == pytest.approx(weights / result["macs"]["macs_effective"])
    assert {"recurrent", "decoder"} <= {part["role"] for part in result["macs"]["parts"]}
    assert result["density_of_all"] == pytest.approx(0.2, abs=0.05)
    assert result["file_bytes"] == len((folder / "paper.sfold").read_bytes())
    assert result["i8_file_bytes"] == len((folder / "paper-i8.sfold").read_bytes()) < result["file_bytes"]
    assert result["race"][1]["parity"]["bound"] is None, "its weights are rounded"
    assert result["transfer_bytes"] == (folder / "transfer.safetensors").stat().st_size
    assert result["training"]["steps"] == STEPS
    assert result["step"] == result["training"]["best_step"]
    assert (result["device"], result["start"]) == ("cpu", None)
    assert [row["engine"] for row in result["race"]] == ["sparsefold", "sparsefold i8"]
    assert result["race"][0]["latency_us"]["calls"] == 200
    assert result["rivals"] == "dense networks: not timed: they were not asked for."
    assert Program.load(folder / "paper.sfold").metadata["corpus"] == corpus.to_dict()
    assert paper.told(result).splitlines()[0].startswith("perplexity ")


def test_bytes_in_place_of_words(config, tmp_path):
    result = paper.run(replace(config, level="byte"), tmp_path)
    assert result["lm"]["level"] == "byte"
    assert paper.told(result).startswith(f"{result['test_bits']:.4f} bits per character on the test split and ")
    assert Program.load(tmp_path / "paper-i8.sfold").metadata["corpus"] == load_corpus(config.corpus, "byte").to_dict()


def test_an_adaptive_softmax_is_counted_and_timed_by_the_words_that_follow(config, whole_run, tmp_path):
    result = paper.run(replace(config, more=f"{config.more}20x60 tied=false"), tmp_path / "run")
    parts = [part for part in result["macs"]["parts"] if part["role"] == "decoder"]
    assert len(parts) == 3, "the first step and two clusters"
    assert result["race"][0]["scores"]
    assert "us mean" in paper.told(result)
    dense = whole_run[1]["fewer_macs"] * whole_run[1]["macs"]["macs_effective"]
    assert result["fewer_macs"] * result["macs"]["macs_effective"] == pytest.approx(dense), "of all words"
    assert {"0.weight", "4.head.weight", "4.tails.1.1.weight"} <= result["density"].keys(), "embedding apart"
    shared = paper.run(replace(config, more=f"{config.more}20x60"), tmp_path / "shared")
    assert result["density"].keys() - shared["density"].keys() == {"0.weight"}, (
        "the embedding has no weights of its own"
    )


def test_dense_networks_of_as_many_weights_are_timed_where_their_engines_are(config, whole_run, tmp_path, monkeypatch):
    folder, plain = whole_run
    monkeypatch.setattr(describe, "find_spec", lambda name: None if name == "openvino" else name)
    without = paper.run(replace(config, rivals=True), folder)
    assert without["rivals"].startswith("dense networks: not timed: openvino is missing here")
    monkeypatch.undo()
    pytest.importorskip("onnxruntime", reason="rivals need ONNX Runtime: pip install 'sparsefold[bench]'.")
    monkeypatch.setattr(describe, "SAMPLE", 200)
    monkeypatch.setattr(describe, "PARITY", 40)
    result = paper.run(replace(config, rivals=True), folder)
    networks = {row["network"] for row in result["race"]}
    assert len(networks) == 3
    assert len(result["race"]) == 4 + 2 * 4 + 1, "ours in float32 and int8, and ONNX Runtime has int8 for LSTM"
    words = result["corpus"]["tokens"]
    for gates, kind in ((4, "lstm"), (3, "gru")):
        name = next(n for n in networks if n.startswith(kind))
        units = int(name.rpartition("x")[2])
        macs = 2 * 3 * gates * units**2 + words * units
        assert macs == pytest.approx(plain["macs"]["macs_dense"], rel=0.1)
    assert "time does not depend on weights" in result["rivals"]
    monkeypatch.setattr(rivals, "PARITY_BOUND", 0.0)
    monkeypatch.setattr(describe, "race", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(rivals.ParityError, match=r"differs from torch by \S+ in a logit"):
        paper.run(replace(config, rivals=True), folder)


@pytest.fixture
def lm_run(text, tmp_path):
    """Folder of a run of the recipe lm on a text of its own."""
    shutil.copy(text, tmp_path / "b.txt")

    def train(*words):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        short = [f"corpus={tmp_path / 'b.txt'}", "steps=6", "batch=4", "bptt=16", "checkpoint_minutes=60"]
        assert main(["train", "lm", *short, *words, "--out", str(folder)]) == 0
        return folder

    return train


def described(folder, *words):
    """What the command says, and what it writes."""
    assert main(["describe", str(folder), "--calls", "200", *words]) == 0
    return json.loads((folder / "described.json").read_text())


def test_a_run_of_the_recipe_lm_is_described_by_a_command(lm_run, capsys):
    folder = lm_run("hidden=12x8", "cutoffs=20x60")
    capsys.readouterr()
    found = described(folder, "--no-rivals")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"perplexity {found['test_perplexity']:.2f} on the test split") and "us mean" in out[1]
    assert out[-1] == str(folder / "described.json")
    assert found["schema"] == "sparsefold-described/1" and found["training"]["step"] == found["training"]["steps"] == 6
    assert found["race"][0]["network"] == "egru-12x8" and found["lm"]["hidden"] == [12, 8]
    assert found["file_bytes"] == (folder / "described.sfold").stat().st_size
    corpus = load_corpus(found["lm"]["corpus"], "word")
    for kind, file in (("f32", "described.sfold"), ("i8", "described-i8.sfold")):
        stream = Engine(Program.load(folder / file)).stream()
        assert found[f"{kind}_sample_bits"] == evaluate(stream, corpus.test[: describe.SAMPLE + 1])


def test_a_dense_network_is_described_beside_others_that_play_it(lm_run, capsys):
    pytest.importorskip("onnxruntime", reason="rivals need ONNX Runtime: pip install 'sparsefold[bench]'.")
    found = described(lm_run("cell=lstm", "hidden=8x8"))
    assert {row["network"] for row in found["race"]} == {"lstm-8x8"}
    assert len(found["race"]) == 2 + 5 and found["event_rate"] is None
    assert found["macs"]["macs_dense"] == pytest.approx(found["fewer_macs"] * found["macs"]["macs_effective"])
    assert "events" not in capsys.readouterr().out.splitlines()[-9]
    for words in (["cell=gru", "hidden=8x12"], ["cell=lstm", "hidden=8", "cutoffs=20"]):  # no other engine plays these
        assert len(described(lm_run(*words))["race"]) == 2


def test_what_cannot_be_described_is_refused_with_a_sentence(lm_run, text, tmp_path, capsys):
    folder = lm_run("hidden=8")

    def refused(where, sentence, *words):
        capsys.readouterr()
        assert main(["describe", str(where), "--no-rivals", *words]) == 2
        assert sentence in capsys.readouterr().err
        assert not (where / "described.json").exists()

    refused(folder, "at least 200, got 10", "--calls", "10")
    refused(tmp_path / "none", "there is no checkpoint")
    changes = {
        "no about": lambda t, f: f.pop("about"),
        "a list": lambda t, f: f.update(about=[]),
        "no progress": lambda t, f: f.pop("progress"),
        "no config": lambda t, f: f["about"].pop("config"),
        "no corpus": lambda t, f: f["about"].pop("corpus"),
        "no words": lambda t, f: f["about"].update(vocabulary=[]),
        "nan": lambda t, f: t["model.2.weight_hh_l0"].fill_(math.nan),
        "fewer": lambda t, f: t.pop("model.2.weight_hh_l0"),
    }
    another = "was trained on another text"
    sentences = {
        "no config": "does not say the settings", "no corpus": another, "no words": another,
        "nan": "every weight must be finite", "fewer": "other weights than",
    }  # fmt: skip
    for name, change in changes.items():
        shutil.copytree(folder, tmp_path / name)
        for file in ("best.safetensors", "last.safetensors"):
            damaged(folder / file, tmp_path / name / file, lambda t, f, m, change=change: change(t, f))
        refused(tmp_path / name, sentences.get(name, "does not say what run it is of"))
    assert (
        main(
            [
                "train",
                "text",
                f"file={text}",
                "steps=2",
                "hidden=8",
                "batch=2",
                "window=8",
                "--out",
                str(tmp_path / "t"),
            ]
        )
        == 0
    )
    refused(tmp_path / "t", "holds a run of the recipe text; this describes those of lm")
    (tmp_path / "b.txt").write_text("another text\n" * 500)
    refused(folder, "was trained on another text than b.txt is now")


@torch.no_grad()
def test_parity_leaves_out_what_rounding_decides():
    torch.manual_seed(0)
    for reset in ("threshold", "none", "output"):
        model = Stack(torch.nn.Embedding(9, 5), EGRU(5, 6, reset=reset), EGRU(6, 6, reset=reset, output="state"))
        _, state, _ = model(torch.tensor([[3]]))
        assert not describe._near_tie(model, state)
        for unit in range(6):
            y, h = state[1].y[0, 0, unit], state[1].h[0, 0, unit]
            u = float(y if y > 0 else h)
            threshold = model[1].get_parameter("threshold_l0")
            before = float(threshold[unit])
            threshold[unit] = u + 2e-6
            assert describe._near_tie(model, state)
            threshold[unit] = before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget": 0.0}, "budget is minutes, positive and finite, got 0.0"), ({"steps": 0}, "steps"), ({"calls": 3}, "calls"),
        ({"density": 0.0}, r"densities lie in \(0, 1\]"), ({"until": "25:00"}, "until is a time of day HH:MM"),
        ({"until": "soon"}, "until is a time of day HH:MM"), ({"more": "lrr=3"}, "unknown key 'lrr'"),
        ({"more": "density=0.1"}, "density is a setting of ptb-paper"), ({"more": "cell=lstm"}, "more cannot say cell"),
        ({"more": "optimizer=sgd"}, "more cannot say optimizer"), ({"hidden": (0,)}, "hidden"),
        ({"more": "batch"}, "written key=value"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        paper.Config(**changes)


def test_a_start_that_is_not_there_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match=r"there is no transfer checkpoint"):
        paper.run(replace(config, start=str(tmp_path / "none")), tmp_path / "run")
