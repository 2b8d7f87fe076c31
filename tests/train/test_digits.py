"""The recipe of spoken digits, on tones that stand for them; the published recordings where they lie on this machine."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import tarfile
import threading

import numpy as np
import pytest
import torch

import sparsefold as sf
from runtime.test_sound import write_wav
from sparsefold.cli import main
from sparsefold.data import digits as corpus
from sparsefold.data.digits import load_digits
from sparsefold.recipes import _loop, digits
from sparsefold.recipes._checkpoint import read_checkpoint
from sparsefold.sound import LogMel
from train.test_text_data import QuietHandler, QuietServer

SMALL = {"hidden": 24, "bands": 12, "steps": 40, "batch": 8, "eval_every": 10, "checkpoint_every": 20, "block": (4, 1)}


def tone(label: int, number: int) -> np.ndarray:
    """A twentieth of a second and more; each label has a pitch of its own."""
    random = np.random.default_rng([label, number])
    t = np.arange(600 + 40 * number) / corpus.RATE
    return 0.4 * np.sin(2 * np.pi * (250 + 330 * label) * t) + 0.02 * random.standard_normal(len(t))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """(a folder of data with a corpus of tones in it, its fingerprint)."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    whole = hashlib.sha256()
    names = sorted(f"{label}_anna_{number}.wav" for label in range(10) for number in range(13))
    for name in names:
        label, _, number = name.removesuffix(".wav").split("_")
        write_wav(folder / name, tone(int(label), int(number)), corpus.RATE)
        whole.update(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return root, whole.hexdigest()


@pytest.fixture
def data(tones, monkeypatch):
    """The corpus of tones in place of the published one: its root."""
    root, fingerprint = tones
    monkeypatch.setattr(corpus, "RECORDINGS", 130)
    monkeypatch.setattr(corpus, "FINGERPRINT", fingerprint)
    monkeypatch.setenv("SPARSEFOLD_DATA", str(root))
    return root


def test_splits_are_by_the_number_of_a_recording(data):
    found = load_digits(data)
    assert [len(s) for s in (found.train, found.valid, found.test)] == [30, 50, 50]
    assert {r.number for r in found.test} == set(range(5)) and {r.number for r in found.valid} == set(range(5, 10))
    assert {(r.label, r.speaker) for r in found.train} == {(str(k), "anna") for k in range(10)}
    np.testing.assert_allclose(found.test[0].samples, tone(0, 0), atol=1e-4)


def test_other_recordings_are_refused(data, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "FINGERPRINT", "0" * 64)
    with pytest.raises(ValueError, match=r"has 130 recordings, which are not the 130 of the Free Spoken Digit Dataset"):
        load_digits()
    with pytest.raises(ValueError, match=r"fsdd is not in .*\. Put the folder 'recordings' of github\.com/"):
        load_digits(tmp_path, download=False)


@pytest.mark.parametrize("whole", [True, False])
def test_the_archive_is_downloaded_and_nothing_else_of_it_is_written(whole, data, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SPARSEFOLD_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source, packed = tmp_path / "server", io.BytesIO()
    source.mkdir()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path in sorted((data / "fsdd/recordings").iterdir()):
            archive.add(path, f"free-spoken-digit-dataset-26eb/recordings/{path.name}")
        for name in ("../../escaped.wav", "/etc/escaped", "recordings/README.md"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    raw = packed.getvalue()
    (source / "fsdd.tar.gz").write_bytes(raw if whole else raw[: len(raw) // 2])
    with QuietServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(source))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(corpus, "URL", f"http://127.0.0.1:{running.server_port}/fsdd.tar.gz")
        if whole:
            assert len(load_digits().train) == 30
            assert (
                "downloading it. Free Spoken Digit Dataset, by Zohar Jackson and others; CC BY-SA 4.0."
                in capsys.readouterr().err
            )
            monkeypatch.setattr(corpus, "URL", "http://127.0.0.1:9/")
            assert len(load_digits().train) == 30, "the second time nothing is downloaded"
        else:
            with pytest.raises(ValueError, match="bytes that are not an archive"):
                load_digits()
        running.shutdown()
        thread.join()
    written = [p for p in tmp_path.rglob("*") if p.is_file() and source not in p.parents]
    assert len(written) == (130 if whole else 0) and {p.suffix for p in written} <= {".wav"}
    assert not [p for p in written if "escaped" in p.name]


def test_a_batch_is_a_function_of_its_number(data):
    config = digits.Config(**SMALL)
    hears, recordings = LogMel(bands=12), load_digits().train
    one, other = (digits.Utterances(config, hears, recordings) for _ in range(2))
    for i in (5, 0, 3):
        (x, y, fresh), (x2, y2, _) = one[i], other[i]
        assert fresh and torch.equal(x, x2) and torch.equal(y, y2)
        assert x.shape[1:] == (8, 12) and y.shape == x.shape[:2]
    heard = [set(one[i][1].max(0).values.tolist()) for i in range(one.per_pass)]
    assert set().union(*heard) <= set(range(10)) and not torch.equal(one[0][0], one[one.per_pass][0])


def test_noise_is_as_loud_as_was_asked():
    random, speech = np.random.default_rng(0), np.sin(np.arange(4000) / 5).astype(np.float32)
    for decibels in (-5.0, 0.0, 20.0):
        noise = digits.noisy(speech, decibels, random) - speech
        assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(decibels, abs=0.01)


def test_frames_before_the_last_two_thirds_and_after_a_recording_ask_for_nothing():
    x, y = digits.padded([(np.ones((9, 2), np.float32), 4), (np.ones((3, 2), np.float32), 7)])
    assert y[:, 0].tolist() == [-100] * 3 + [4] * 6 and y[:, 1].tolist() == [-100, 7, 7] + [-100] * 6
    assert x[:, 1].sum(1).tolist() == [2.0] * 3 + [0.0] * 6


@pytest.mark.parametrize("cell", ["egru", "gru"])
def test_it_learns_tones_and_says_what_it_counted(cell, data, tmp_path):
    config = digits.Config(**{**SMALL, "steps": 150, "cell": cell, "noise": (10.0, 30.0)})
    summary = digits.run(config, tmp_path)
    assert summary["test_accuracy"]["inf dB"] > 0.8 and set(summary["test_accuracy"]) == {"inf dB", "10 dB", "0 dB"}
    assert summary["density"][digits.RECURRENT] == pytest.approx(0.1, abs=0.03)
    assert summary["density"][digits.INPUT] == pytest.approx(0.25, abs=0.03)
    assert (summary["event_rate"] is None) == (cell == "gru")
    assert summary["macs"]["macs_effective"] < 0.5 * summary["macs"]["macs_dense"]
    assert summary["best_step"] >= 90, "the best is as sparse as the last"
    assert "named rightly of the test split: " in digits.told(summary)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(data, tmp_path, monkeypatch):
    config = digits.Config(**SMALL)
    whole = digits.run(config, tmp_path / "whole")
    advance = _loop._advance

    def until_25(trainer, model, step, state):
        if step == 25:
            raise KeyboardInterrupt
        return advance(trainer, model, step, state)

    monkeypatch.setattr(_loop, "_advance", until_25)
    with pytest.raises(KeyboardInterrupt):
        digits.run(config, tmp_path / "parts")
    monkeypatch.undo()
    monkeypatch.setenv("SPARSEFOLD_DATA", str(data))
    monkeypatch.setattr(corpus, "RECORDINGS", 130)
    monkeypatch.setattr(corpus, "FINGERPRINT", whole["corpus"]["sha256"])
    assert {**digits.run(config, tmp_path / "parts"), "seconds": 0} == {**whole, "seconds": 0}
    tensors = [read_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())


def test_from_the_command_line_to_a_named_recording(data, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "digits.sfold"
    words = [f"{k}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in {**SMALL, "steps": 120}.items()]
    assert main(["train", "digits", *words, "noise=10,30", "--out", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert digits.told(summary) in capsys.readouterr().out
    assert main(["compile", str(run), "-o", str(file), "--weights", "i8"]) == 0
    program = sf.Program.load(file)
    assert program.metadata["labels"] == list("0123456789") and program.metadata["hears"]["bands"] == 12
    capsys.readouterr()
    assert main(["eval", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(summary["test_accuracy"]["inf dB"], abs=0.1)
    assert main(["run", str(file), "--wav", str(data / "fsdd/recordings/7_anna_2.wav")]) == 0
    assert capsys.readouterr().out.startswith("7_anna_2.wav: ")
    with pytest.raises(ValueError, match="noise is a range of decibels within -60 and 120"):
        digits.Config(noise=(5.0, 1.0))


def test_the_published_recordings(data_folder):
    found = load_digits(data_folder("fsdd").parent)
    assert [len(s) for s in (found.train, found.valid, found.test)] == [2400, 300, 300]
    assert sum(
        len(r.samples) for s in (found.train, found.valid, found.test) for r in s
    ) / corpus.RATE == pytest.approx(1312.3, abs=0.1)
    assert len({r.speaker for r in found.test}) == 6 and math.isclose(max(abs(found.test[0].samples)), 1, abs_tol=1)
