"""What a network hears, as a whole and as it comes, and what the command line says of recordings."""

from __future__ import annotations

import json
import wave
from dataclasses import replace

import numpy as np
import pytest

import cases
import sparsefold as sf
import tolerances
from sparsefold.cli import main
from sparsefold.hearing import UNSCORED, heard, labels_of
from sparsefold.sound import FLOOR, LogMel, read_wav

F = np.float32
HEARS = LogMel(rate=800, frame=20, hop=8, bands=5)


def sound(seed: int, samples: int) -> np.ndarray:
    return (0.3 * cases.rng(seed).standard_normal(samples)).clip(-1, 1).astype(F)


def write_wav(path, samples, rate=800, channels=1, width=2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes((np.asarray(samples) * (2**15 - 1)).astype("<i2").tobytes())


def network(**metadata) -> sf.Program:
    r = cases.rng(3)
    about = {"hears": HEARS.to_dict(), "labels": ["yes", "no", "none"]} | metadata
    return sf.Program((cases.egru(r, 5, 16, (4, 1), 0.5), cases.linear(r, 16, 3)), about)


def test_a_frame_is_what_the_equation_says():
    """Directly: a discrete Fourier transform of 32 points, triangles on the mel scale."""
    x = sound(0, 50)
    found = HEARS(x)
    assert found.shape == (4, 5) and found.dtype == F
    top = 2595 * np.log10(1 + 400 / 700)
    for t, row in enumerate(found):
        frame = x[8 * t : 8 * t + 20].astype(float) * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(20) / 19))
        power = [abs(sum(v * np.exp(-2j * np.pi * k * n / 32) for n, v in enumerate(frame))) ** 2 for k in range(17)]
        mel = [2595 * np.log10(1 + 25 * k / 700) for k in range(17)]
        for b in range(5):
            low, middle, high = (top * (b + s) / 6 for s in range(3))
            weight = [max(0, min((m - low) / (middle - low), (high - m) / (high - middle))) for m in mel]
            assert row[b] == pytest.approx(np.log(FLOOR + np.dot(weight, power)), abs=tolerances.SPECTRUM_F32)


def test_mean_and_deviation_are_of_the_recordings():
    recordings = [sound(k, 300) * (k + 1) for k in range(3)]
    measured = HEARS.measured(recordings)
    seen = np.concatenate([measured(x) for x in recordings])
    np.testing.assert_allclose(seen.mean(0), 0, atol=tolerances.SPECTRUM_F32)
    np.testing.assert_allclose(seen.std(0), 1, atol=tolerances.SPECTRUM_F32)
    assert LogMel.from_metadata(json.loads(json.dumps({"hears": measured.to_dict()}))) == measured


@pytest.mark.parametrize("pieces", [1, 7, 19, 20, 64, 1000])
def test_as_the_samples_come_the_same_is_heard(pieces):
    x, listener = sound(1, 333), HEARS.stream()
    for _ in range(2):
        found = [listener.push(x[k : k + pieces]) for k in range(0, len(x), pieces)]
        np.testing.assert_array_equal(np.concatenate(found), HEARS(x))
        listener.reset()


def test_what_is_shorter_than_a_frame_is_not_heard():
    assert HEARS(sound(0, 19)).shape == (0, 5) and HEARS(sound(0, 20)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"19 samples are less than a frame of 20: nothing was heard\."):
        heard(sf.Engine(network()).stream(), HEARS, sound(0, 19))
    with pytest.raises(ValueError, match=r"sound has one axis, of one channel; got shape \(2, 30\)\."):
        HEARS(np.zeros((2, 30)))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"bands": 0}, "bands of a LogMel is a whole number from 1"),
        ({"rate": True}, "rate of a LogMel is a whole number"),
        ({"hop": 21}, r"a hop of 21 samples would leave out some between frames of 20\."),
        ({"bands": 21}, r"a frame of 20 samples has no 21 bands\."),
        ({"mean": (1.0,)}, "mean has a finite value for each of 5 bands, or none at all"),
        ({"deviation": (1.0, np.nan, 1, 1, 1)}, "deviation has a finite value for each of 5 bands"),
        ({"deviation": (1.0, 0.0, 1, 1, 1)}, "deviation is above 0 in every band"),
    ],
)
def test_what_cannot_be_heard_is_refused(how, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(HEARS, **how)


def test_the_answer_is_the_likeliest_over_the_last_two_thirds():
    program, x = network(), sound(2, 200)
    stream = sf.Engine(program).stream()
    y = stream.run(HEARS(x)).astype(float)
    y = y[int(len(y) * UNSCORED) :]
    scores = (y - np.log(np.exp(y).sum(1, keepdims=True))).sum(0)
    for _ in range(2):  # from the beginning each time
        answer, sure = heard(stream, HEARS, x)
        assert answer == scores.argmax()
        np.testing.assert_allclose(sure, scores - np.log(np.exp(scores).sum()), atol=tolerances.FREE_RUNNING_F32)


def test_a_wav_file_is_read_as_it_was_written(tmp_path):
    x = sound(4, 100)
    write_wav(tmp_path / "a.wav", x)
    np.testing.assert_allclose(read_wav(tmp_path / "a.wav", 800), x, atol=tolerances.PCM16)
    write_wav(tmp_path / "stereo.wav", x, channels=2)
    write_wav(tmp_path / "bytes.wav", x, width=1)
    (tmp_path / "text.wav").write_text("RIFF and no more")
    (tmp_path / "empty.wav").write_bytes(b"")
    for name, rate, sentence in [
        (
            "a",
            8000,
            "has 800 samples a second in 1 channels of 16 bits; wanted are 8000 in one of 16. Convert it first.",
        ),
        ("stereo", 800, "800 samples a second in 2 channels"),
        ("bytes", 800, "in 1 channels of 8 bits"),
        ("text", 800, "text.wav is not a WAV file that is read here"),
        ("empty", 800, "empty.wav is not a WAV file that is read here"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            read_wav(tmp_path / f"{name}.wav", rate)


def test_a_damaged_wav_file_is_read_or_refused_with_a_sentence(tmp_path):
    write_wav(tmp_path / "a.wav", sound(4, 100))
    whole, random, refused = (tmp_path / "a.wav").read_bytes(), cases.rng(9), 0
    for _ in range(2000):
        raw = bytearray(whole)
        for place in random.integers(0, 60, 3):
            raw[place] = random.choice([0, 255, random.integers(256)])
        (tmp_path / "b.wav").write_bytes(raw[: random.integers(20, 300)])
        try:
            assert np.isfinite(read_wav(tmp_path / "b.wav", 800)).all()
        except ValueError as error:
            refused += 1
            assert str(error).endswith(".")
    assert refused > 500


def test_long_recordings_are_heard_in_pieces(monkeypatch):
    x, whole = sound(5, 700), HEARS(sound(5, 700))
    monkeypatch.setattr("sparsefold.sound.CHUNK", 13)
    np.testing.assert_array_equal(HEARS(x), whole)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"hears": None}, "does not say what it hears"),
        ({"hears": {"bands": "5"}}, "is not to be read: bands of a LogMel is a whole number"),
        ({"hears": {"mean": 3}}, "is not to be read: "),
        ({"hears": {"bands": 6, "frame": 20, "hop": 8}}, "hears 6 bands and reads something else: it is damaged"),
        ({"labels": None}, "are no words of printable characters"),
        ({"labels": ["a", "b", 3]}, "are no words of printable characters"),
        ({"labels": ["a", "b", "\x1b[2J"]}, "are no words of printable characters"),
        ({"labels": ["a", "b"]}, "has 2 names for 3 outputs"),
        ({"hears": {"frame": 2**17}}, "frame of a LogMel is a whole number from 1 to 65536"),
    ],
)
def test_a_file_that_says_nonsense_of_what_it_hears_is_refused(metadata, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        labels_of(network(**metadata), tmp_path / "a.sfold")


def test_recordings_are_named_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "net.sfold"
    network().save(file)
    program, wavs = sf.Program.load(file), tmp_path / "wavs"
    wavs.mkdir()
    expected = {}
    for k in range(6):
        path = wavs / f"{('yes', 'no')[k % 2]}_anna_{k}.wav"
        write_wav(path, sound(k, 150 + k))
        expected[path.name] = heard(sf.Engine(program).stream(), HEARS, read_wav(path, 800))
    (wavs / "other.wav").write_bytes(b"")  # begins with no label
    assert main(["run", str(file), "--wav", *(str(wavs / name) for name in expected)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (name, (answer, sure)) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{name}: {('yes', 'no', 'none')[answer]} ({np.exp(sure[answer]):.1%}), else ")
        assert "s of sound heard in" in line
    assert main(["eval", str(file), "--wav", str(wavs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    right = [name for name, (answer, _) in expected.items() if name.startswith(("yes_", "no_", "none_")[answer])]
    assert found["accuracy"] == pytest.approx(len(right) / 6) and found["recordings"] == 6
    assert {w["recording"] for w in found["wrong"]} == set(expected) - set(right)
    assert found["frames"] == sum(len(HEARS(read_wav(wavs / name, 800))) for name in expected)
    assert main(["eval", str(file), "--wav", str(wavs)]) == 0
    out = capsys.readouterr().out
    assert f"{len(right) / 6:.1%} of 6 recordings named rightly" in out and "MACs a frame (counted)" in out


def test_the_command_line_refuses_with_a_sentence(tmp_path, capsys):
    file, text = tmp_path / "net.sfold", tmp_path / "text.sfold"
    network().save(file)
    cases.network("tokens").save(text)
    write_wav(tmp_path / "short.wav", [0.0] * 5)
    for words, said in [
        (["run", str(file)], "hears, and writes nothing. Name recordings: --wav FILE."),
        (["run", str(file), "--wav", str(tmp_path / "short.wav")], "short.wav: 5 samples are less than a frame of 20"),
        (["run", str(file), "--wav", str(tmp_path / "none.wav")], "No such file or directory."),
        (["run", str(text), "--wav", str(tmp_path / "short.wav")], "this program does not say what it hears"),
        (
            ["eval", str(file), "--wav", str(tmp_path / "none")],
            "has no WAV file whose name begins with a label and _, like yes_",
        ),
        (["eval", str(file), "--data-dir", str(tmp_path / "none")], "the data folder"),
    ]:
        assert main(words) == 2, words
        assert said in capsys.readouterr().err
