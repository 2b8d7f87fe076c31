"""The command line: every command does its work, and every wrong input gets one sentence and the exit status 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sparsefold as sf
from sparsefold import _native
from sparsefold.cli import main
from sparsefold.data import load_text
from sparsefold.engine import Engine
from sparsefold.language import sample
from sparsefold.progress import Progress

TINY = ["hidden=16", "embedding=8", "batch=4", "window=8", "steps=30"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a trained run and its compiled file, made by the command line."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["train", "text", *TINY, "--out", str(folder / "run")]) == 0
    assert main(["compile", str(folder / "run"), "-o", str(folder / "text.sfold")]) == 0
    return folder


@pytest.fixture
def model(made):
    return str(made / "text.sfold")


@pytest.fixture
def call(capfdbinary):
    """A function: arguments -> (exit status, stdout, stderr), through `main`."""

    def run(*words: object) -> tuple[int, str, str]:
        capfdbinary.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as leave:
            status = leave.code
        out, err = capfdbinary.readouterr()
        return status, out.decode("latin-1"), err.decode()

    return run


def assert_refused(outcome: tuple[int, str, str], sentence: str) -> None:
    status, out, err = outcome
    assert status == 2
    assert out == ""
    assert re.fullmatch(rf"sparsefold: [^\n]*{sentence}[^\n]*[.?]\n", err), err


# --- train and compile -----------------------------------------------------------------------------------------------


def test_list_shows_every_setting_as_it_would_be_typed(call):
    from sparsefold.recipes import text

    status, out, err = call("train", "text", "--list", "hidden=512")
    assert (status, err) == (0, "")
    settings = dict(line.split("=", 1) for line in out.splitlines())
    assert list(settings) == list(text.Config.__dataclass_fields__)
    assert settings["hidden"] == "512"
    assert settings["block"] == "16x1"
    status, again, _ = call("train", "text", "--list", *(f"{k}={v}" for k, v in settings.items()))
    assert (status, again) == (0, out)


def test_list_without_a_recipe_shows_the_recipes(call):
    status, out, _ = call("train", "--list")
    assert status == 0
    assert re.match(r"text +Byte-level language model", out)


def test_train_writes_a_summary_and_says_what_comes_next(call, tmp_path):
    folder = tmp_path / "a run"
    status, out, err = call("train", "text", "--out", folder, *TINY)
    assert (status, err) == (0, "")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"]["hidden"] == 16
    assert out.startswith(
        f"{summary['valid_bits_per_char']:.4f} bits per character on the validation split (step 30 of 30"
    )
    assert "Compile it: sparsefold compile" in out
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "log.jsonl",
        "summary.json",
    ]
    assert call("train", "text", *TINY, "--out", folder)[:2] == (0, out), "a finished run says the same again"


def test_the_folder_is_named_after_the_recipe_when_left_out(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train", "text", *TINY)[0] == 0
    assert (tmp_path / "runs" / "text" / "summary.json").is_file()


def test_ctrl_c_says_how_to_go_on_and_the_command_it_names_does(call, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Progress, "update", lambda self, done, note="": done == 5 and signal.raise_signal(signal.SIGINT)
    )
    folder = tmp_path / "a run"
    status, out, err = call("train", "text", *TINY, "--out", folder)
    assert (status, out) == (130, "")
    assert "stopped after step 6; everything is saved" in err
    monkeypatch.undo()
    import shlex

    command = shlex.split(err.splitlines()[-1].partition("go on: ")[2])
    assert command[0] == "sparsefold"
    assert call(*command[1:])[0] == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 30


def test_an_interrupt_without_words_is_called_one(call, monkeypatch, model):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsefold.cli._load", interrupt)
    assert call("inspect", model) == (130, "", "\nsparsefold: interrupted.\n")


def test_compile_takes_a_folder_or_a_file_and_makes_the_same(call, made, tmp_path):
    status, out, _ = call("compile", made / "run", "-o", tmp_path / "a.sfold")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'a.sfold'}: {(tmp_path / 'a.sfold').stat().st_size:,} bytes\n")
    assert "egru" in out and "embedding" in out
    assert call("compile", made / "run" / "best.safetensors", "-o", tmp_path / "b.sfold")[0] == 0
    assert (tmp_path / "a.sfold").read_bytes() == (tmp_path / "b.sfold").read_bytes()
    metadata = sf.Program.load(tmp_path / "a.sfold").metadata
    assert metadata["recipe"] == "text"
    assert metadata["config"]["hidden"] == 16
    assert metadata["corpus"] == load_text().to_dict()
    assert metadata["vocabulary"] == list(load_text().vocabulary)
    assert metadata["training"]["step"] == 30


def test_compile_tunes_with_a_text_and_inspect_says_why(call, made, tmp_path):
    (tmp_path / "sample.txt").write_bytes(b"def f(x):\n    return x\n" * 20)
    words = ["compile", made / "run", "-o", tmp_path / "tuned.sfold", "--tune", "--sample", tmp_path / "sample.txt"]
    assert call(*words)[0] == 0
    for file, known in ((tmp_path / "tuned.sfold", "timed, "), (made / "text.sfold", "estimated, 10.0% assumed")):
        shown = call("inspect", file)[1]
        row = next(line for line in shown.splitlines() if line.startswith("1 weight_hh"))
        assert known in row and ("counted" in row) == (known == "timed, "), shown
        assert "choices:" not in shown


@pytest.mark.parametrize(
    "choices", ["x", [1], [{}], [{"op": "a"}], {"op": 1}, [{"op": 1, "matrix": "m", "candidates": [[1]]}], []], ids=str
)
def test_inspect_shows_no_choices_where_a_file_says_nonsense(choices, call, tmp_path):
    op = sf.program.Linear(sf.Dense(np.ones((2, 3))), np.zeros(2, np.float32))
    sf.Program((op,), {"choices": choices, "a": 1}).save(tmp_path / "x.sfold")
    status, shown, _ = call("inspect", tmp_path / "x.sfold")
    assert status == 0 and "known by" not in shown and "a: 1" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], r"name the recipe to train\. Recipes: text"),
        (["train", "texts"], r"there is no recipe 'texts'\. Recipes: text"),
        (["train", "text", "hiden=3"], r"unknown key 'hiden'\. Did you mean hidden"),
        (["train", "text", "hidden=many"], r"hidden must be a whole number; got 'many'"),
        (["train", "text", "hidden"], r"written key=value; got 'hidden'"),
        (["train", "text", "hidden=0"], r"hidden is in \[1, 16384\], got 0"),
        (["train", "text", "--out", "{file}"], r"cannot write to the run folder .*one\.txt"),
        (["train", "text", "file=nothing.txt"], r"cannot read the text file nothing\.txt: No such file"),
        (["train", "text", "file={file}"], r"one\.txt has 1 bytes; a corpus needs at least 1000"),
        (["train", "text", *TINY, "lr=1e6"], r"training diverged; .* lower lr"),
        (["train", "text", *TINY, "steps=31"], r"steps is given twice"),
        (["train", "text", *TINY[:4], "steps=31", "--out", "{run}"], r"holds a run with another steps.* another --out"),
        (["compile", "nothing", "-o", "{out}"], r"there is no checkpoint nothing"),
        (
            ["compile", "{folder}", "-o", "{out}"],
            r"there is no checkpoint .*best\.safetensors\. Pass the folder of a run",
        ),
        (["compile", "{model}", "-o", "{out}"], r"no checkpoint that .* \(it is a compiled program\)"),
        (["compile", "{foreign}", "-o", "{out}"], r"no checkpoint that this version of sparsefold reads"),
        (["compile", "{file}", "-o", "{out}"], r"one\.txt is not a readable checkpoint"),
        (["compile", "{run}", "-o", "{folder}/nowhere/a.sfold"], r"the folder .*nowhere does not exist"),
        (["compile", "{run}", "-o", "{folder}"], r"folder: it is a folder"),
        (["demo", "--steps", "0"], r"steps is at least 1, got 0"),
        (["demo", "--out", "{file}"], r"cannot write to the run folder .*one\.txt"),
        *(
            ([command, file], sentence)
            for command in ("inspect", "run", "eval", "bench")
            for file, sentence in (
                ("nothing.sfold", r"nothing\.sfold: No such file or directory"),
                ("{folder}", r"folder: Is a directory"),
                ("{file}", r"one\.txt: the file has 1 bytes"),
                ("{cut}", r"cut\.sfold: .*cut off \(at byte \d+\)"),
                ("{damaged}", r"damaged\.sfold: .*checksum.* \(at byte \d+\)"),
                ("{foreign}", r"foreign\.safetensors: .*not a sparsefold program"),
                ("{run}/best.safetensors", r"best\.safetensors: .*not a sparsefold program: compile the model first"),
            )
        ),
        (["run", "{model}", "--tokens", "-1"], r"--tokens.*must not be negative"),
        (["run", "{model}", "--temperature", "-0.1"], r"--temperature.*must not be negative"),
        (["run", "{model}", "--temperature", "nan"], r"--temperature.*must not be negative"),
        (["run", "{model}", "--seed", "-1"], r"--seed must not be negative"),
        (["run", "{values}"], r"values\.sfold is not a language model: it does not read a token"),
        (["eval", "{values}"], r"values\.sfold is not a language model"),
        (["eval", "{short_vocabulary}"], r"is not a language model"),
        (["eval", "{model}", "--text", "{file}"], r"one\.txt has 1 bytes; at least 2 are needed"),
        (["eval", "{model}", "--text", "nothing.txt"], r"nothing\.txt: No such file"),
        (["eval", "{model}", "--text", "{folder}"], r"folder: Is a directory"),
        (["eval", "{elsewhere}"], r"the text this model was trained beside is not at hand\. Pass a text with --text"),
        (["calibrate", "nothing.sfold", "-o", "{out}", "--sample", "{file}"], r"nothing\.sfold: No such file"),
        (["calibrate", "{model}", "-o", "{out}", "--sample", "nothing.txt"], r"nothing\.txt: No such file"),
        (["calibrate", "{model}", "-o", "{out}", "--sample", "{file}"], r"one\.txt has 1 bytes; at least 2 are needed"),
        (["calibrate", "{model}", "-o", "{out}", "--sample", "{cut}"], r"no product of this program may read changes"),
        (["calibrate", "{values}", "-o", "{out}", "--sample", "{file}"], r"is not a language model"),
        (
            ["calibrate", "{values}", "-o", "{out}", "--sample", "{array}"],
            r"array\.npy is not an array that numpy\.save wrote",
        ),
        (["bench", "{model}", "--steps", "999"], r"--steps is at least 1000"),
        (["bench", "{model}", "--isa", "z80"], r"instruction set 'z80' is not available .*generic"),
        (["report", "nothing.json"], r"nothing\.json: No such file"),
        (["report", "{folder}"], r"folder: Is a directory"),
        (["report", "{broken}"], r"broken\.json is not JSON"),
        (["report", "{model}"], r"text\.sfold is not JSON"),
        (["report", "{list}"], r"schema None"),
        (["report", "{hollow}"], r"hollow\.json is not a summary as the demo writes it"),
        (["report", "{hollow}", "--markdown"], r"hollow\.json is not a summary as the demo writes it"),
        (["report", "{hollow}", "-o", "{out}"], r"hollow\.json is not a summary as the demo writes it"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_gets_a_sentence(words, sentence, call, made, bad_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {**bad_files, "run": made / "run", "model": made / "text.sfold", "out": tmp_path / "out"}
    assert_refused(call(*(word.format(**places) for word in words)), sentence)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def bad_files(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    whole = (made / "text.sfold").read_bytes()
    damaged = bytearray(whole)
    damaged[-100] ^= 1
    (folder / "folder").mkdir()
    (folder / "one.txt").write_bytes(b"a")
    (folder / "cut.sfold").write_bytes(whole[:-100])
    (folder / "damaged.sfold").write_bytes(damaged)
    save_file({"a": torch.zeros(3)}, folder / "foreign.safetensors")
    sf.compile_model(torch.nn.Linear(3, 2)).save(folder / "values.sfold")
    program = sf.Program.load(made / "text.sfold")
    vocabulary = program.metadata["vocabulary"]
    sf.Program(program.ops, {**program.metadata, "vocabulary": vocabulary[1:]}).save(folder / "short.sfold")
    sf.Program(program.ops, {**program.metadata, "corpus": {"sha256": "0"}}).save(folder / "elsewhere.sfold")
    (folder / "broken.json").write_text("{")
    (folder / "array.npy").write_bytes(b"")
    (folder / "list.json").write_text("[1]")
    (folder / "hollow.json").write_text('{"schema": "sparsefold-demo/1", "networks": {}, "rows": [{}]}')
    return {
        "folder": folder / "folder",
        "file": folder / "one.txt",
        "cut": folder / "cut.sfold",
        "damaged": folder / "damaged.sfold",
        "foreign": folder / "foreign.safetensors",
        "values": folder / "values.sfold",
        "short_vocabulary": folder / "short.sfold",
        "elsewhere": folder / "elsewhere.sfold",
        "broken": folder / "broken.json",
        "list": folder / "list.json",
        "hollow": folder / "hollow.json",
        "array": folder / "array.npy",
    }


@pytest.mark.parametrize(
    "words", [[], ["tran"], ["inspect"], ["inspect", "a", "b"], ["train", "text", "a=b", "--foo"], ["compile", "a"]]
)
def test_wrong_usage_shows_the_usage(words, call):
    status, out, err = call(*words)
    assert (status, out) == (2, "")
    assert err.startswith("usage: sparsefold")
    assert "a=b" not in err, "only what was wrong is named"


@pytest.mark.parametrize("command", ["", "demo", "train", "compile", "run", "eval", "inspect", "bench", "report"])
def test_help(command, call):
    status, out, err = call(*([command] if command else []), "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: sparsefold {command}".rstrip())


# --- play ------------------------------------------------------------------------------------------------------------


def test_inspect_names_ops_sizes_and_origin(call, model):
    status, out, err = call("inspect", model)
    assert (status, err) == (0, "")
    assert f"{Path(model).stat().st_size:,} bytes" in out
    for word in (
        "0 embedding",
        "1 egru",
        "2 linear",
        "weight_hh 48x16",
        "folds the embedding",
        'recipe: "text"',
        "sha256",
    ):
        assert word in out


def generated(outcome: tuple[int, str, str], prompt: str) -> str:
    status, out, err = outcome
    assert status == 0
    assert out.startswith(prompt)
    assert "counted per step" in err
    return out[len(prompt) :]


def test_run_writes_the_prompt_and_as_many_bytes_as_asked_for(call, model):
    text = generated(call("run", model, "--prompt", "The ", "--tokens", 50), "The ")
    assert len(text) == 50
    assert set(text.encode("latin-1")) <= set(load_text().vocabulary), "the unknown token is never drawn"
    assert generated(call("run", model, "--prompt", "The ", "--tokens", 50), "The ") == text
    assert generated(call("run", model, "--prompt", "The ", "--tokens", 50, "--seed", 1), "The ") != text
    assert generated(call("run", model, "--prompt", "", "--tokens", 3), "\n")[2:]


@pytest.mark.parametrize("prompt", ["\u20ac\u00e9\x00", os.fsdecode(b"\xff\xfe")], ids=["unknown", "not utf-8"])
def test_run_takes_any_bytes_as_prompt(call, model, prompt):
    shown = os.fsencode(prompt).decode("latin-1")
    assert len(generated(call("run", model, "--prompt", prompt, "--tokens", 5), shown)) == 5


def test_run_of_no_bytes_writes_the_prompt(call, model):
    assert generated(call("run", model, "--prompt", "x", "--tokens", 0), "x") == ""


@pytest.mark.parametrize("temperature", ["0", "1e-320"])
def test_the_coldest_run_takes_the_likeliest_byte_whatever_the_seed(call, model, temperature):
    words = ["run", model, "--prompt", "a", "--tokens", 30, "--temperature"]
    texts = {generated(call(*words, temperature, "--seed", seed), "a") for seed in range(3)}
    assert len(texts) == 1
    assert texts == {generated(call(*words, "0"), "a")}


def test_sample_follows_the_softmax_and_never_the_unknown():
    logits = np.array([0.0, 1.0, -1.0, 50.0], np.float32)
    random = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, 0.5, random) for _ in range(4000)], minlength=4) / 4000
    p = np.exp(logits[:3] / 0.5)
    np.testing.assert_allclose(drawn, [*(p / p.sum()), 0], atol=0.03)  # 4 standard deviations of the mean
    assert sample(logits, 0, random) == 1


def test_eval_reads_the_test_split_it_was_trained_beside(call, model):
    status, out, err = call("eval", model)
    assert (status, err) == (0, "")
    corpus = load_text()
    assert f"bits per character on test split, {len(corpus.test):,} bytes" in out
    assert "us per byte p50" in out
    assert f"{len(corpus.test) - 1} steps" in out
    logits = Engine.load(model).stream().run(corpus.test[:-1]).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log2(p[np.arange(len(p)), corpus.test[1:]]).mean()
    assert float(out.split()[0]) == pytest.approx(expected, abs=6e-5)


def test_eval_in_json_says_the_same(call, model, tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes(b"Some text, and some \xff\x00 of it unknown. " * 30)
    status, out, err = call("eval", model, "--text", text, "--json")
    assert (status, err) == (0, "")
    figures = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert figures["bytes"] == len(text.read_bytes())
    assert figures["cost"]["steps"] == figures["bytes"] - 1
    assert 0 < figures["event_rate"] < 1
    assert figures["latency_us"]["p50"] > 0
    plain = call("eval", model, "--text", text)[1]
    assert plain.startswith(f"{figures['bits_per_char']:.4f} bits per character on {text}, {figures['bytes']:,} bytes")


def test_eval_of_two_bytes(call, model, tmp_path):
    (tmp_path / "two").write_bytes(b"ab")
    assert call("eval", model, "--text", tmp_path / "two")[0] == 0


def test_bench_times_every_instruction_set(call, model):
    status, out, err = call("bench", model, "--steps", 1000)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("1000 steps")
    assert [line.split()[0] for line in lines[1:]] == list(_native.available_isas())
    for line in lines[1:]:
        p50, p99 = (float(x) for x in re.fullmatch(r"\S+ +p50 +(\S+) +p99 +(\S+) +mean +\S+", line).groups())
        assert 0 < p50 <= p99


def test_bench_plays_programs_that_read_values(call, tmp_path):
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GRU(4, 5), torch.nn.Linear(5, 2))
    sf.compile_model(layers).save(tmp_path / "values.sfold")
    status, out, _ = call("bench", tmp_path / "values.sfold", "--steps", 1000, "--isa", "generic")
    assert status == 0
    assert out.splitlines()[1].startswith("generic")
    assert call("inspect", tmp_path / "values.sfold")[0] == 0


# --- other processes -------------------------------------------------------------------------------------------------


def test_without_torch_files_are_played_and_training_says_what_to_install(model, made, tmp_path):
    script = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None  # as if it were not installed
from sparsefold.cli import main
model, run = sys.argv[1:]
def out(*words):
    print("--", *words, main([*words]), file=sys.stderr, flush=True)
out("inspect", model)
out("run", model, "--tokens", "3")
out("eval", model)
out("bench", model, "--steps", "1000", "--isa", "generic")
out("train", "text", "steps=1")
out("train", "--list")
out("compile", run, "-o", "x.sfold")
out("demo")
assert not [name for name in sys.modules if name.split(".")[0] in ("safetensors", "onnx", "onnxruntime", "matplotlib")]
"""
    command = [sys.executable, "-c", script, model, str(made / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    statuses = [line.split()[-1] for line in said if line.startswith("--")]
    assert statuses == ["0"] * 4 + ["2"] * 4
    assert said.count("sparsefold: this command needs torch: pip install 'sparsefold[train]'.") == 4
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command(model):
    script = Path(sys.executable).parent / "sparsefold"
    command = [script] if script.exists() else [sys.executable, "-m", "sparsefold.cli"]
    run = [*command, "run", model, "--tokens", "200000"]
    reader = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(reader.stdout.read(10)) == 10, "text arrives while it is made"
    reader.stdout.close()  # as `| head -c 10` does
    assert reader.stderr.read() == b""
    reader.stderr.close()
    assert reader.wait() == 0
    done = subprocess.run([*command, "inspect", "nothing.sfold"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sparsefold: nothing.sfold: No such file or directory.\n"


# --- prune and pictures ----------------------------------------------------------------------------------------------

RULES = """
["*weight_hh*"]
rule = "block"
density = [0.25, 0.5, 0.75]
block = [4, 1]

["*out.weight"]
rule = "nm"
n = 1
m = 4
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    return path


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"rnn": torch.nn.GRU(5, 8, bidirectional=True), "out": torch.nn.Linear(8, 4)})


def assert_pruned(tensors):
    for name in ("rnn.weight_hh_l0", "rnn.weight_hh_l0_reverse"):
        assert (tensors[name].view(3, -1) != 0).sum(1).tolist() == [16, 32, 48]
    assert ((tensors["out.weight"].view(4, 2, 4) != 0).sum(2) == 1).all()
    assert (tensors["rnn.weight_ih_l0"] != 0).all()


@pytest.mark.parametrize("kind", ["safetensors", "torch", "nested"])
def test_prune_any_checkpoint(call, tmp_path, rules, network, kind):
    from safetensors import safe_open

    path, out = (tmp_path / f"{n}.{'safetensors' if kind == 'safetensors' else 'pt'}" for n in ("in", "out"))
    state = network.state_dict()
    if kind == "safetensors":
        save_file(state, path, {"made by": "a test"})
    else:
        torch.save({"model": state, "step": 3, "loss": [0.5]} if kind == "nested" else state, path)
    before = path.read_bytes()
    status, shown, err = call("prune", path, "--rules", rules, "-o", out)
    assert (status, err) == (0, "") and path.read_bytes() == before
    assert "16/64   25.00%" in shown and "8/32   25.00%" in shown
    if kind == "safetensors":
        with safe_open(str(out), "pt") as file:
            assert file.metadata() == {"made by": "a test"}
            tensors = {name: file.get_tensor(name) for name in state}
    else:
        loaded = torch.load(out, weights_only=True)
        assert kind == "torch" or (loaded["step"], loaded["loss"]) == (3, [0.5])
        tensors = loaded["model"] if kind == "nested" else loaded
    assert list(tensors) == list(state)
    assert_pruned(tensors)
    network.load_state_dict(tensors)
    assert network["rnn"](torch.randn(2, 1, 5))[0].isfinite().all()


def test_a_runs_own_checkpoint_is_pruned_in_place_and_compiles(call, made, tmp_path):
    path = tmp_path / "best.safetensors"
    path.write_bytes((made / "run/best.safetensors").read_bytes())
    (tmp_path / "r.toml").write_text('["model.1.weight_hh*"]\nrule = "magnitude"\ndensity = 0.1\n')
    assert call("prune", path, "--rules", tmp_path / "r.toml", "-o", path)[0] == 0
    assert call("compile", path, "-o", tmp_path / "a.sfold")[0] == 0
    assert (sf.Program.load(tmp_path / "a.sfold").ops[1].weight_hh.to_dense() != 0).sum() == 3 * 26


def test_prune_refuses_with_a_sentence(call, tmp_path, rules, network):
    import pickle

    good, out = tmp_path / "good.safetensors", tmp_path / "out"
    save_file(network.state_dict(), good)
    evil, noise, bad = tmp_path / "evil.pt", tmp_path / "noise.pt", tmp_path / "noise.safetensors"
    evil.write_bytes(pickle.dumps(Progress))
    noise.write_bytes(b"PK no zip")
    bad.write_bytes(b"\x08nothing")

    def refused(checkpoint, text, sentence):
        rules.write_text(text)
        assert_refused(call("prune", checkpoint, "--rules", rules, "-o", out), sentence)
        assert not out.exists()

    refused(tmp_path / "none.pt", RULES, "there is no checkpoint")
    refused(evil, RULES, "holds more than tensors, or is damaged; code in it is not run")
    refused(noise, RULES, "noise.pt")
    refused(bad, RULES, "is not a safetensors file")
    refused(good, "density", "rules.toml is not TOML")
    refused(good, "", "there is no rule")
    refused(good, '["x"]\nrule = "blok"', "unknown rule 'blok'. Did you mean 'block'")
    refused(good, '["nothing"]\nrule = "nm"\nn = 1\nm = 2', "no parameter is named 'nothing'")
    refused(good, '["*bias*"]\nrule = "nm"\nn = 1\nm = 2', "rules prune matrices")
    rules.write_text(RULES)
    assert_refused(call("prune", good, "--rules", tmp_path / "none", "-o", out), "none: No such file")
    assert_refused(call("prune", good, "--rules", rules, "-o", tmp_path / "no/out"), "the folder .* does not exist")


def test_masks_are_drawn(call, made, model, tmp_path, rules, network):
    pytest.importorskip("matplotlib", reason="matplotlib draws the masks")
    import matplotlib.image

    save_file(network.state_dict(), tmp_path / "in.safetensors")
    words = ("prune", tmp_path / "in.safetensors", "--rules", rules, "-o", tmp_path / "out.safetensors")
    assert call(*words, "--png", tmp_path / "masks.png")[0] == 0
    assert call("inspect", model, "--png", tmp_path / "program.png")[0] == 0
    for name in ("masks", "program"):
        pixels = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert pixels.shape[0] > 100 and pixels.shape[1] > 900
    from sparsefold._figures import patterns

    half = np.zeros((64, 40), bool)
    half[:32] = True
    image = matplotlib.image.imread(BytesIO(patterns({"a": (half, 1)})))[..., :3]
    ink, paper = ((np.abs(image - np.array(c) / 255).max(2) < 0.01).sum() for c in ((18, 58, 92), (242, 244, 246)))
    # 7 pixels a weight, but for the frame
    assert ink == pytest.approx(32 * 40 * 49, rel=0.03) and paper == pytest.approx(32 * 40 * 49, rel=0.03)
