"""Language models: settings, what they are made of, training that a kill does not change, pruning on the way, and edges."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from processes import alone, together
from sparsefold.cli import main
from sparsefold.data import load_corpus, load_text
from sparsefold.engine import Engine
from sparsefold.lowering import compile_model
from sparsefold.nn import EGRU, GRU, LSTM, AdaptiveDecoder, Stack
from sparsefold.recipes import _loop, lm
from sparsefold.recipes._checkpoint import Progressed, read_checkpoint, save_checkpoint
from sparsefold.recipes._config import from_dict, override
from sparsefold.recipes._language import LockedDropout, SampledLinear, Smoothness, WordEmbedding, build, plain
from sparsefold.recipes._lm_config import Config, resolved
from sparsefold.recipes._windows import stream_bits
from sparsefold.recipes.names import RECIPES
from tolerances import REORDERED_F32, STREAMED_F32, TRAINED_F32

pytestmark = pytest.mark.filterwarnings("ignore:.*no instructions for bfloat16")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [f.name for f in fields(Config)])
def test_every_default_survives_the_command_line_and_json(setting):
    for config in (Config(), resolved(Config(size="paper")), Config(snapshots=(0.5, 0.1), hidden=(3, 4))):
        value = getattr(config, setting)
        joint = "," if setting == "snapshots" else "x"
        word = f"{setting}={joint.join(map(str, value)) if isinstance(value, tuple) else value}"
        assert getattr(override(replace(config), [word]), setting) == value
        assert from_dict(Config, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hidden=0"], "hidden"), (["hidden=4x100000"], "hidden"), (["epochs=0"], "epochs"), (["minutes=-1"], "minutes"),
        (["epochs=1", "steps=2"], "give one of them"), (["epochs=1", "minutes=2"], "give one of them"),
        (["snapshots=0.1,0.5"], "snapshots"), (["snapshots=1.5,0.5"], "snapshots"), (["snapshots=0.5,0"], "snapshots"),
        (["snapshots=0.5", "density=0.5"], "leave density out"), (["snapshots=x"], "numbers like 0.5,0.25"),
        (["drop_input=1"], "drop_input"), (["lr=0"], "lr"), (["prune_begin=0.9"], "prune_begin"),
        (["cutoffs=0x5"], "cutoffs"), (["cutoffs=9x5"], "cutoffs"),
        (["divide=0"], "divide"), (["divide=1e-300"], "divide"), (["divide=nan"], "divide"),
        (["decoder_frequency=2"], "decoder_frequency"),
        (["surrogate_width=0"], "surrogate_width"), (["cell=rnn"], "cell"), (["precision=half"], "precision"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        override(Config(), words)


def test_the_sizes_of_the_papers():
    """reference: 24.17 M recurrent weights of the event network, 20.19 M of AWD-LSTM, the embedding apart."""
    egru, awd = (resolved(Config(size="paper", cell=cell)) for cell in ("egru", "lstm"))
    assert (egru.hidden, egru.embedding, egru.batch, egru.epochs) == ((1350, 1350, 750), 750, 64, 1000.0)
    assert (awd.hidden, awd.embedding, awd.optimizer, awd.lr) == ((1150, 1150, 400), 400, "sgd", 30.0)
    for config, millions in ((egru, 24.17), (awd, 20.19)):
        gates = 4 if config.cell == "lstm" else 3
        widths = (config.embedding, *config.hidden)
        weights = sum(gates * h * (i + h) for i, h in pairwise(widths))
        assert weights / 1e6 == pytest.approx(millions, abs=0.09)  # of AWD-LSTM biases are counted in there
    assert resolved(Config(size="paper", corpus="wikitext2")).batch == 128
    assert resolved(Config(size="paper", batch=3)).batch == 3, "what is said stays"
    assert resolved(Config(steps=5)).epochs is None
    assert resolved(Config(minutes=5)).epochs is None


def test_a_tied_decoder_wants_an_embedding_of_the_last_layers_size():
    assert resolved(Config(hidden=(30, 20))).embedding == 20
    assert resolved(Config(hidden=(30, 20), embedding=7, tied=False)).embedding == 7
    with pytest.raises(ValueError, match=r"got 7 and 20\. Give embedding the size of the last layer, or tied=false\."):
        resolved(Config(hidden=(30, 20), embedding=7))
    with pytest.raises(ValueError, match=r"pruned together"):
        resolved(Config(embedding_density=0.5))


# --- what a model is made of -----------------------------------------------------------------------------------------


def test_a_locked_mask_is_the_same_at_every_step_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = LockedDropout(0.3).train(), torch.ones(7, 50, 200, dtype=torch.float64)
    y = layer(x)
    assert (y == y[0]).all()
    assert set(y.unique().tolist()) == {0.0, 1 / 0.7}
    assert y[0].mean() == pytest.approx(1, abs=4 * math.sqrt(0.3 / 0.7 / 10_000))
    assert layer.eval()(x) is x
    assert LockedDropout(0.0).train()(x) is x


def test_dropped_words_are_whole_and_the_same_in_a_window():
    torch.manual_seed(0)
    layer, tokens = WordEmbedding(1000, 4, 0.2, 3.0).train(), torch.arange(1000).repeat(2).view(2, 1000)
    y = layer(tokens)
    factor = y / (3 * layer.weight)
    assert torch.equal(y[0], y[1])
    kept = (y[0] != 0).all(1)
    assert ((y[0] != 0).any(1) == kept).all()
    torch.testing.assert_close(factor[0][kept], torch.full_like(factor[0][kept], 1 / 0.8))
    assert kept.float().mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 1000))
    torch.testing.assert_close(layer.eval()(tokens)[0], 3 * layer.weight)


def test_tied_weights_are_one_parameter_with_the_gradient_of_both():
    config = resolved(Config(cell="lstm", hidden=(6,), steps=1, drop_input=0.0, drop_output=0.0))
    tied, apart = build(config, 11).double(), build(replace(config, tied=False), 11).double()
    assert tied[-1].weight is tied[0].weight
    assert len(list(tied.parameters())) == len(list(apart.parameters())) - 1
    apart.load_state_dict(tied.state_dict())
    tokens = torch.randint(11, (5, 2))
    for model in (tied, apart):
        cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten()).backward()
    torch.testing.assert_close(tied[0].weight.grad, apart[0].weight.grad + apart[-1].weight.grad)


def test_an_embedding_that_shares_an_adaptive_softmaxs_weights_has_none_and_adds_its_gradient():
    config = resolved(Config(cell="lstm", hidden=(6,), steps=1, drop_input=0, drop_output=0, cutoffs=(3, 7), tied=True))
    tied, apart = build(config, 11).double(), build(replace(config, tied=False), 11).double()
    assert [n for n, _ in apart.named_parameters() if n not in dict(tied.named_parameters())] == ["0.weight"]
    apart.load_state_dict({"0.weight": tied[-1].vectors().detach(), **tied.state_dict()})
    tokens = torch.arange(22).view(11, 2) % 11
    for model in (tied, apart):
        logp = model(model[-1].targets(tokens))[0]
        model[-1].loss(logp, tokens).backward()
    through = torch.autograd.grad(
        tied[-1].vectors(), list(tied[-1].parameters()), apart[0].weight.grad, allow_unused=True
    )
    for one, other, more in zip(tied[-1].parameters(), apart[-1].parameters(), through, strict=True):
        torch.testing.assert_close(one.grad, other.grad if more is None else other.grad + more)


def test_vectors_shared_with_an_adaptive_softmax_start_as_long_as_others():
    config = resolved(Config(hidden=(300,), steps=1, cutoffs=(100, 400), tied=True))
    table = build(config, 1000)[0].table().detach() / config.embedding_scale
    lengths = table.norm(dim=1)  # of 300 numbers drawn from [-0.1, 0.1): 1
    for part in (lengths[:100], lengths[100:400], lengths[400:]):
        assert part.mean() == pytest.approx(1, abs=0.1)


def test_the_price_of_outputs_and_of_their_change_is_the_papers():
    config = resolved(Config(cell="egru", hidden=(5, 6), steps=1, drop_output=0.5, alpha=2.0, beta=3.0))
    model = build(config, 11).double().train()
    price = Smoothness(model, 2.0, 3.0)
    assert price() == 0.0
    seen = {}
    model[-3].register_forward_hook(lambda m, i, o: seen.update(raw=o[0]))
    model[-2].register_forward_hook(lambda m, i, o: seen.update(dropped=o))
    model(torch.randint(11, (4, 3)))
    raw, dropped = seen["raw"].detach().numpy(), seen["dropped"].detach().numpy()
    assert raw.shape == (4, 3, 6)
    slow = sum(((raw[t] - raw[t - 1]) ** 2).sum() for t in range(1, 4)) / (3 * 3 * 6)
    assert price().item() == pytest.approx(2 * (dropped**2).mean() + 3 * slow, rel=REORDERED_F32)
    model(torch.randint(11, (1, 3)))
    assert math.isfinite(price().item()), "one step has no change"


@pytest.mark.parametrize("samples", [0, 11])
def test_a_sample_of_all_words_is_the_whole_softmax(samples):
    torch.manual_seed(0)
    share = torch.full((11,), 1 / 11)
    decoder = SampledLinear(4, 11, samples, share).double().train()
    x, y = torch.randn(3, 2, 4, dtype=torch.float64), torch.randint(11, (3, 2))
    wanted = torch.nn.functional.linear(x, decoder.weight, decoder.bias)
    assert torch.equal(decoder.targets(y), y)
    torch.testing.assert_close(decoder(x), wanted, rtol=REORDERED_F32, atol=REORDERED_F32)
    torch.testing.assert_close(decoder.eval()(x), wanted)


def test_the_sum_over_a_sample_of_words_is_right_on_average():
    """Σ exp over all words against the mean over draws of targets and sample, within five standard errors."""
    torch.manual_seed(0)
    share = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01])
    decoder = SampledLinear(3, 8, 2, share).double().train()
    x, own = torch.randn(1, 1, 3, dtype=torch.float64), 4
    whole = torch.nn.functional.linear(x, decoder.weight, decoder.bias).exp().sum().item()
    sums = []
    for _ in range(4000):
        others = torch.multinomial(share, 3, replacement=True)
        y = torch.cat([torch.tensor([own]), others])[:, None]
        wanted = decoder.targets(y)
        logits = decoder(x.expand(4, 1, 3))
        full = torch.nn.functional.linear(x, decoder.weight, decoder.bias)[0, 0]
        assert logits[0, 0, wanted[0, 0]].item() == pytest.approx(full[own].item(), rel=REORDERED_F32), (
            "a target is not corrected"
        )
        # Word 4 stands there for sure for its own step, which is not part of how often it does: take its term out and add it.
        chance = decoder._drawn[1]
        terms = logits[0, 0].exp()
        sums.append((terms.sum() - terms[wanted[0, 0]]).item() + full[own].exp().item())
        assert chance.max() <= 0
    n = len(sums)
    # Its probability is that of four targets where three others can bring a word: chances are taken for y.numel() = 4.
    error = np.std(sums) / math.sqrt(n)
    bias = sum(
        full[w].exp().item()
        * ((1 - (1 - share[w].item()) ** 3 * (1 - 2 / 8)) / (1 - (1 - share[w].item()) ** 4 * (1 - 2 / 8)) - 1)
        for w in range(8)
        if w != own
    )
    assert np.mean(sums) == pytest.approx(whole + bias, abs=5 * error)


@pytest.mark.parametrize("cell", ["egru", "gru", "lstm"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cutoffs", [(), (2, 5)], ids=str)
def test_what_compiles_plays_as_what_was_trained(cell, tied, cutoffs):
    said = {"hidden": (7, 6), "embedding": None if tied else 5, "tied": tied, "cutoffs": cutoffs, "drop_word": 0.5}
    model = build(resolved(Config(cell=cell, steps=1, samples=3, **said)), 11, torch.full((11,), 1 / 11))
    decoder = AdaptiveDecoder if cutoffs else SampledLinear
    assert [type(m) for m in model[2::2]] == [{"egru": EGRU, "gru": GRU, "lstm": LSTM}[cell]] * 2 + [decoder]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    tokens = torch.randint(11, (40,))
    model.eval()
    with torch.no_grad():
        wanted = model(tokens[:, None])[0][:, 0].numpy()
        assert np.array_equal(plain(model)(tokens[:, None])[0][:, 0].numpy(), wanted)
    played = Engine(compile_model(plain(model))).stream().run(tokens.numpy())
    if cell != "egru":  # of event units rounding may flip one
        np.testing.assert_allclose(played, wanted, atol=STREAMED_F32)
    assert played.shape == wanted.shape


@pytest.mark.parametrize("cutoffs", [(), (4, 20)])
def test_frequent_words_keep_more_of_a_decoder_pruned_by_frequency(cutoffs):
    share = torch.linspace(1, 0.01, 48) ** 4
    share /= share.sum()
    kept = []
    for power in (0.0, 1.0):
        config = Config(
            hidden=(32,),
            steps=1,
            cutoffs=cutoffs,
            tied=False,
            decoder_density=0.5,
            decoder_frequency=power,
            block=(1, 1),
        )
        model = build(resolved(config), 48, share)
        pruner, _ = lm.pruner_of(resolved(config), model, share)
        (name,) = pruner.masks
        assert name.endswith("head.weight" if cutoffs else "weight")
        target = pruner._targets[name]
        kept.append(target.rule.mask(target.weight).float().mean(1))
    often, seldom = ([4], [3]) if cutoffs else ([0, 1], [-1, -2])  # row 4: the words 4 to 19 together
    assert (kept[1][often] > kept[0][often]).any() and (kept[1][seldom] < kept[0][seldom]).any()
    assert [k.mean().item() for k in kept] == pytest.approx([0.5, 0.5])


def test_products_of_our_layers_take_bfloat16_where_that_is_the_precision():
    x, w = torch.randn(64, 64), torch.randn(64, 64)

    class On:
        autocast, device = torch.bfloat16, torch.device("cpu")

    before = x @ w
    with _loop._float32_products(On):
        asked = torch.backends.mkldnn.matmul.fp32_precision
    assert asked == "bf16"
    assert torch.equal(x @ w, before)
    On.autocast = None
    with _loop._float32_products(On):
        assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    """Some 3000 words."""
    file = tmp_path_factory.mktemp("corpus") / "a.txt"
    corpus = load_text()
    file.write_bytes(bytes(corpus.vocabulary[t] for t in corpus.train[5000:25_000]))
    return str(file)


BASE = {
    "steps": 24, "hidden": (16, 12), "batch": 4, "eval_every": 5, "checkpoint_every": 7, "drop_word": 0.1, "drop_input": 0.2,
    "drop_hidden": 0.2, "drop_output": 0.2, "drop_connect": 0.2, "alpha": 1.0, "beta": 1.0, "samples": 40,
}  # fmt: skip
RUNS = {
    "egru": {"cell": "egru", "snapshots": (1.0, 0.5, 0.25), "decoder_density": 0.5, "block": (1, 1), "lr": 1e-2},
    "awd": {"cell": "lstm", "optimizer": "sgd", "schedule": "constant", "lr": 5.0, "average_from": 0.4, "density": 0.5,
            "block": (4, 1), "prune_every": 2},
    "gru": {"cell": "gru", "precision": "bfloat16", "drop_connect": 0.0},
    "adaptive": {"cell": "egru", "cutoffs": (30, 90), "tied": True, "density": 0.5, "decoder_density": 0.5,
                 "decoder_frequency": 0.5, "block": (4, 1)},
}  # fmt: skip


@pytest.fixture(scope="module")
def config(corpus_file):
    return lambda run, **changes: Config(**{"corpus": corpus_file, **BASE, **RUNS[run], **changes})


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    done = {}

    def get(run: str) -> tuple[Path, dict]:
        if run not in done:
            folder = tmp_path_factory.mktemp(run)
            done[run] = folder, lm.run(config(run), folder)
        return done[run]

    return get


def test_the_precision_follows_the_processor_where_it_is_left_to_it(config, tmp_path, monkeypatch):
    device, corpus = torch.device("cpu"), load_corpus(config("egru").corpus, "word", None)

    def planned(precision: str, **capabilities: bool) -> Config:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        return lm.planned(resolved(config("egru", precision=precision)), corpus, tmp_path, device)

    assert planned("auto", avx2=True, avx512_bf16=False).precision == "float32"
    assert planned("auto", amx_bf16=True).precision == "bfloat16"
    assert lm.trainer_of(planned("auto", amx_bf16=True), corpus, device).autocast is torch.bfloat16
    assert planned("bfloat16", avx512_bf16=True).precision == "bfloat16"
    with pytest.warns(UserWarning, match="no instructions for bfloat16"):
        assert planned("bfloat16", avx2=True).precision == "bfloat16"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not lm.multiplies_bfloat16(device)
    assert lm.multiplies_bfloat16(torch.device("cuda"))


def test_training_begins_with_the_weights_of_another_run(config, uninterrupted, tmp_path):
    folder, _ = uninterrupted("adaptive")
    again = config("adaptive", initial=str(folder), lr=1e-30, steps=5, prune_begin=0.0, prune_until=0.0, drop_input=0.5)
    lm.run(again, tmp_path / "again")
    before, after = (dict(lm.load(f)[0].named_parameters()) for f in (folder, tmp_path / "again"))
    assert all(torch.equal(p, before[name]) for name, p in after.items())
    assert lm.load(tmp_path / "again")[1]["progress"]["step"] == 5
    with pytest.raises(
        ValueError, match=r"is of another network than these settings make\. Give the settings that it had"
    ):
        lm.run(replace(again, hidden=(16, 13)), tmp_path / "other")
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"other{i % 150}" for i in range(3000)))
    with pytest.raises(ValueError, match="has learned other words than those of this text"):
        lm.run(replace(again, corpus=str(other)), tmp_path / "other")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        lm.run(replace(again, initial=str(tmp_path / "none")), tmp_path / "other")


def test_a_checkpoint_that_asks_for_another_network_is_refused_before_there_is_one(
    uninterrupted, tmp_path, monkeypatch
):
    tensors, facts = read_checkpoint(uninterrupted("gru")[0] / "best.safetensors")
    facts["about"]["config"]["hidden"] = [2**14, 2**14]  # 11 GB
    save_checkpoint(tmp_path / "large.safetensors", tensors, facts["about"], Progressed())
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("a network was made"))
    with pytest.raises(
        ValueError, match=r"other weights than its own settings ask for: it is damaged\. 2\.bias_hh_l0 is \(48,\), by"
    ):
        lm.load(tmp_path / "large.safetensors")


@pytest.mark.parametrize("run", ["gru", "egru"])
def test_a_checkpoint_is_read_without_drawing_weights_that_it_replaces(run, uninterrupted):
    facts = lm.load(uninterrupted(run)[0])[1]
    drawn = torch.get_rng_state()
    torch.manual_seed(facts["about"]["config"]["seed"])  # as making a network begins
    assert torch.equal(drawn, torch.get_rng_state())


@pytest.mark.parametrize(
    "about", [{}, {"config": {}}, {"config": [], "vocabulary": ["a"]}, {"config": {}, "vocabulary": 3}], ids=str
)
def test_a_checkpoint_that_does_not_say_its_settings_is_refused(about, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"model.x": torch.zeros(2)}, {"recipe": "lm", **about}, Progressed())
    with pytest.raises(ValueError, match="does not say the settings and the vocabulary of its network"):
        lm.load(path)
    assert main(["compile", str(path), "-o", str(tmp_path / "a.sfold")]) == 2
    assert "does not say" in capsys.readouterr().err
    save_checkpoint(path, {"model.x": torch.zeros(2)}, {**about, "recipe": 3}, Progressed())
    assert main(["compile", str(path), "-o", str(tmp_path / "a.sfold")]) == 2
    assert "does not say which recipe made it" in capsys.readouterr().err


def killed(config: Config, folder: Path, step: int, writing: bool) -> None:
    """Trains and is killed after a step, or while it writes its next checkpoint."""
    if writing:
        replace_ = Path.replace

        def fatal(self: Path, target: Path) -> Path:
            if target.name == "last.safetensors" and target.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return replace_(self, target)

        Path.replace = fatal
    else:
        advance = _loop._advance

        def fatal_step(trainer: _loop.Trainer, model: Stack, at: int, state: object) -> object:
            if at == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return advance(trainer, model, at, state)

        _loop._advance = fatal_step
    lm.run(config, folder)


@pytest.mark.filterwarnings("ignore:.*rows per gate")
@pytest.mark.parametrize("run", list(RUNS))
def test_a_run_that_is_killed_at_any_moment_goes_on_with_the_same_bits(run, config, uninterrupted, tmp_path):
    expected, summary = uninterrupted(run)
    assert alone(killed, config(run), tmp_path, 3, False) == -signal.SIGKILL  # before the first checkpoint
    assert not (tmp_path / "last.safetensors").exists()
    assert alone(killed, config(run), tmp_path, 13, False) == -signal.SIGKILL  # between an evaluation and a checkpoint
    assert read_checkpoint(tmp_path / "last.safetensors")[1]["progress"]["step"] == 7
    assert alone(killed, config(run), tmp_path, 0, True) == -signal.SIGKILL
    assert list(tmp_path.glob(".last.safetensors.*")), "half a file"
    torch.rand(7)
    again = lm.run(config(run), tmp_path)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in expected.iterdir())
    names = [p.name for p in expected.glob("*.safetensors")]
    for name in names:
        got, wanted = load_file(tmp_path / name), load_file(expected / name)
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert torch.equal(got[key], wanted[key]), f"{key} of {name}"
    if run == "awd":
        assert "average.steps" in load_file(tmp_path / "last.safetensors")
    logs = [
        [{**json.loads(x), "seconds": 0} for x in (f / "log.jsonl").read_text().splitlines()]
        for f in (tmp_path, expected)
    ]
    assert logs[0] == logs[1]


def test_two_processes_train_what_one_does(config, tmp_path):
    """Without anything random, as float32 allows: sums of gradients are in another order."""
    quiet = {"drop_word": 0.0, "drop_input": 0.0, "drop_hidden": 0.0, "drop_output": 0.0, "samples": 0, "steps": 8}
    settings = config("gru", precision="float32", **quiet)
    one = lm.run(settings, tmp_path / "one")
    first, second = together(lm.run, settings, tmp_path / "two")
    assert "test_perplexity" in first and "test_perplexity" not in second
    two, wanted = (load_file(tmp_path / f / "best.safetensors") for f in ("two", "one"))
    for key in wanted:
        torch.testing.assert_close(two[key], wanted[key], rtol=TRAINED_F32, atol=TRAINED_F32 / 10)
    log = [json.loads((tmp_path / f / "log.jsonl").read_text().splitlines()[-1]) for f in ("one", "two")]
    assert log[1]["valid_perplexity"] == pytest.approx(log[0]["valid_perplexity"], rel=TRAINED_F32)
    assert one["best_step"] > 0


def test_snapshots_are_as_dense_as_their_names_and_the_best_is_as_sparse_as_the_last(uninterrupted):
    folder, summary = uninterrupted("egru")
    assert [lm.load(folder / f"snapshot-{d}.safetensors")[1]["progress"]["step"] for d in (1, 0.5, 0.25)] == [
        10,
        17,
        24,
    ]
    for density in (1, 0.5, 0.25):
        model, facts = lm.load(folder / f"snapshot-{density}.safetensors")
        for layer in model[1:-1]:
            for name in ("weight_hh_l0", "weight_ih_l0"):
                assert (getattr(layer, name) != 0).float().mean() == pytest.approx(density, abs=0.01)
        for weight in (model[0].weight, model[-1].weight):
            assert (weight != 0).float().mean() == pytest.approx(max(density, 0.5), abs=0.01)
        corpus = load_corpus(facts["about"]["config"]["corpus"], "word")
        assert stream_bits(model, corpus.valid, streams=32)[0] == pytest.approx(
            facts["about"]["valid"], rel=STREAMED_F32
        )
    assert summary["best_step"] >= 21, "where the last stair ends"
    model, _ = lm.load(folder)
    assert (model[1].weight_hh_l0 != 0).float().mean() == pytest.approx(0.25, abs=0.01)


def test_the_summary_is_of_the_best_model_read_as_one_stream(uninterrupted, config):
    folder, summary = uninterrupted("awd")
    model, _ = lm.load(folder)
    corpus = load_corpus(config("awd").corpus, "word")
    bits, _ = stream_bits(model, corpus.test)
    assert summary["test_perplexity"] == pytest.approx(2**bits)
    assert summary["config"]["steps"] == 24
    assert summary["corpus"]["tokens"] == corpus.tokens
    last = load_file(folder / "last.safetensors")
    averaged, _ = lm.load(folder / "last.safetensors")
    torch.testing.assert_close(averaged[-1].weight.detach(), last["average.mean.0.weight"])
    assert not torch.equal(last["average.mean.0.weight"], last["model.0.weight"])


def test_the_rate_falls_from_snapshot_to_snapshot_and_goes_with_the_windows_length(config):
    settings = resolved(config("egru", steps=100, restart=0.5))
    corpus = load_corpus(settings.corpus, "word")
    trainer = lm.trainer_of(settings, corpus, torch.device("cpu"))
    assert lm.segments(settings) == [(0, 40), (40, 70), (70, 100)]
    assert trainer.snapshots == {40: "snapshot-1", 70: "snapshot-0.5", 100: "snapshot-0.25"}
    lengths = [b - a for a, b in map(trainer.windows.span, range(100))]
    rates = np.array([trainer.lr(i) for i in range(100)]) / np.array(lengths) * 70
    assert len(set(lengths)) > 3
    assert rates[:40].max() == pytest.approx(settings.lr, rel=1e-3)
    assert rates[40:70].max() == pytest.approx(0.5 * settings.lr, rel=1e-3)
    assert (rates[[39, 69, 99]] < 0.02 * settings.lr).all()
    cosine = replace(settings, schedule="cosine", constant_until=0.6)
    assert [lm.shape(cosine, p) for p in (0, 0.6, 0.8, 1)] == pytest.approx([1, 1, 0.5, 0])


def test_minutes_become_steps_once(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(lm, "pace", lambda trainer: asked.append(1) or (0.5, 0.25))
    first = lm.run(config("gru", steps=None, minutes=0.1), tmp_path)
    assert first["config"]["steps"] == first["steps"] == round((6 - 10 * 0.25) / 0.5) == 7
    again = lm.run(config("gru", steps=None, minutes=0.1), tmp_path)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert len(asked) == 1
    with pytest.raises(ValueError, match=r"another minutes"):
        lm.run(config("gru", steps=None, minutes=0.2), tmp_path)


def test_the_pace_is_measured(config):
    settings = replace(resolved(config("gru")), steps=1000, eval_every=1000)
    trainer = lm.trainer_of(settings, load_corpus(settings.corpus, "word"), torch.device("cpu"))
    window, evaluation = _loop.pace(trainer)
    assert 0 < window < 5
    assert 0 < evaluation < 60


def test_the_command_trains_compiles_and_says_perplexity(corpus_file, tmp_path, capsys):
    words = ["corpus=" + corpus_file, "cell=gru", "hidden=8", "steps=4", "batch=2"]
    assert main(["train", "lm", *words, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
    assert main(["compile", str(tmp_path / "run"), "-o", str(tmp_path / "a.sfold")]) == 0
    assert (tmp_path / "a.sfold").exists()
    assert main(["train", "lm", *words, "level=byte", "--out", str(tmp_path / "bytes")]) == 0
    assert "bits per character" in capsys.readouterr().out
    assert main(["train", "wikitext2", "--list"]) == 0
    assert "corpus=wikitext2" in capsys.readouterr().out.splitlines()
    assert RECIPES["ptb"].Config().corpus == "ptb"


# --- edges -----------------------------------------------------------------------------------------------------------


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a few words only\n" * 70)
    with pytest.raises(ValueError, match=r"too few for 20 streams of at least one window of 32 steps"):
        lm.run(Config(corpus=str(tmp_path / "short.txt"), hidden=(4,), steps=2), tmp_path / "run")


def test_a_run_from_before_a_setting_existed_goes_on_if_that_has_its_default(config, tmp_path, monkeypatch):
    lm.run(config("egru"), tmp_path / "whole")
    begun, stop = config("egru"), _loop._Run._short
    monkeypatch.setattr(_loop._Run, "_short", lambda self, _: self.at.step == 8)
    with pytest.raises(KeyboardInterrupt):
        lm.run(begun, tmp_path / "run")
    monkeypatch.setattr(_loop._Run, "_short", stop)
    last = tmp_path / "run" / "last.safetensors"
    tensors, facts = read_checkpoint(last)
    for young in ("cutoffs", "decoder_frequency"):
        del facts["about"]["config"][young]
    save_checkpoint(last, tensors, facts["about"], Progressed(**facts["progress"]))
    with pytest.raises(ValueError, match="another decoder_frequency"):
        lm.run(replace(begun, decoder_frequency=0.5), tmp_path / "run")
    lm.run(begun, tmp_path / "run")
    ours, whole = (read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("run", "whole"))
    assert all(torch.equal(ours[k], whole[k]) for k in whole if k.startswith("model."))


def test_another_text_in_the_same_folder_is_refused(config, uninterrupted, tmp_path):
    folder, _ = uninterrupted("gru")
    other = tmp_path / "b.txt"
    other.write_bytes(Path(config("gru").corpus).read_bytes() + b"and more words\n" * 9)
    with pytest.raises(ValueError, match=r"holds a run with another corpus"):
        lm.run(config("gru", corpus=str(other)), folder)


@pytest.mark.parametrize("cell", ["egru", "lstm"])
def test_the_papers_network_trains(cell, corpus_file, tmp_path):
    trainer = lm.trainer_of(
        resolved(Config(corpus=corpus_file, cell=cell, size="paper", steps=2, batch=2)),
        load_corpus(corpus_file, "word"),
        torch.device("cpu"),
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    _, figures, _ = _loop._advance(trainer, trainer.model.train(), 0, None)
    bits, norm, rate = figures.read()
    assert math.isfinite(bits + norm)
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert sum(moved) == len(moved) - (3 if cell == "egru" else 0), "all but frozen thresholds"
    if cell == "egru":
        thresholds = torch.cat([trainer.model[k].threshold_l0.detach() for k in (2, 4, 6)])
        assert thresholds.mean() == pytest.approx(0.01, abs=0.004)
        assert thresholds.median() < 1e-6, "Beta(0.03, 3)"
        assert 0 < rate < 1
