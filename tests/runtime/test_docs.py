"""Tables in README and docs are what docs/generate.py makes of the committed results; the stub is what the extension says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import generate
import pytest
from tables import engine, language, pruning, training

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/pruning.md"])
def test_tables_are_generated(page: str) -> None:
    text = (ROOT / page).read_text()
    assert generate.render(text, generate.SECTIONS[page]) == text, f"{page} is not what 'make docs' writes"


def test_figures_are_generated() -> None:
    for page, make in generate.FIGURES.items():
        assert (ROOT / page).read_text() == make(), f"{page} is not what 'make docs' writes"


def test_rows_from_c_and_of_sparse_inputs_say_so(monkeypatch, tmp_path: Path) -> None:
    about = {"processor": "A", "isa": "avx2", "units": 128, "layers": 1, "latency_us": {"p50": 1.5, "p99": 2.5}}
    about |= {"ratio_to_fastest_f32": 7.25, "ratio_to_fastest_int8": 6.25, "density": 0.1, "event_rate": 0.11}
    path = tmp_path / "steps-2026-01-01-abc.jsonl"
    monkeypatch.setattr(engine, "newest", lambda *_: path)
    monkeypatch.setattr(engine, "ROOT", tmp_path)

    def made(**line: object) -> list[str]:
        path.write_text(json.dumps(about | line) + "\n")
        table = engine.steps().splitlines()
        return [table[2], table[-1]]

    figures = "10% of blocks, 11.0% events | 1.50 | 2.50 | 7.2x | 6.2x |"
    for name in ("ours, f32, from C", "ours, f32, exported C"):
        row, foot = made(engine=name, input_rate=1.0)
        assert row == f"| 128 x 1 | **{name}**, {figures}"
        assert "Python call included except in the rows from C. From" in foot
    row, foot = made(engine="ours, f32", input_rate=0.1)
    assert row == f"| 128 x 1, 10% of x | **ours, f32**, {figures}"
    assert "Python call included. From" in foot


def test_the_table_of_streams_is_made_of_the_newest_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ROOT", tmp_path)
    assert engine.throughput() == "Not measured yet."
    folder = tmp_path / "bench/results/a-machine"
    folder.mkdir(parents=True)
    line: dict[str, object] = {
        "units": 1350, "layers": 3, "density": 0.1, "event_rate": 0.115, "steps_per_second": 100, "precision": "bf16",
        "processor": "A Processor", "isa": "avx2", "cost": {"bytes_weights": 9e5, "bytes_index": 1e5, "bytes_state": 5e4},
    }  # fmt: skip
    ways = [
        {"batch": 1, "how": "one core", "us_per_step": 125.0, "streams": 80},
        {"batch": 8, "how": "one core", "us_per_step": 100.0, "streams": 100},
        {"batch": 8, "how": "two cores, a batch each", "us_per_step": 52.6, "streams": 190},
        {"batch": 8, "how": "threads=2", "us_per_step": 55.6, "streams": 180},
    ]
    (folder / "throughput-2025-01-01-b.jsonl").write_text("damaged")
    newest = folder / "throughput-2025-01-02-a.jsonl"
    newest.write_text("".join(json.dumps(line | way) + "\n" for way in ways))
    table = engine.throughput()
    assert "| bf16 | 1 | 125.0 | **80** |  |  | 1,050 |" in table
    assert "| bf16 | 8 | 100.0 | **100** | 190 (1.90x) | 180 (1.80x) | 1,050 |" in table
    assert table.endswith(
        "1350 x 3 units, 10% of blocks, 11.5% events, 100 steps a second. A Processor, avx2, Python call included. "
        "From [throughput-2025-01-02-a.jsonl](../bench/results/a-machine/throughput-2025-01-02-a.jsonl)."
    )


def test_the_tables_of_a_gpu_are_made_of_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROOT", tmp_path)
    assert training.on_a_gpu() == "Not measured yet."
    folder = tmp_path / "bench/results/a-gpu"
    folder.mkdir(parents=True)
    about = {
        "processor": "A GPU",
        "torch": "2.13",
        "cuda": "13.0",
        "cudnn": 9,
        "triton": "3.7",
        "seed": 0,
        "units": 1350,
    }
    train = {"figure": "training", "batch": 64, "dtype": "float32", "tf32": False}
    step = {"figure": "step", "layers": 3}
    lines: list[dict[str, object]] = [
        train | {"engine": "ours, EGRU", "ms": 2.0, "against nn.GRU (cuDNN)": 1.5},
        train | {"engine": "nn.GRU (cuDNN)", "ms": 3.0, "against nn.GRU (cuDNN)": 1.0, "tf32": True},
        step
        | {"engine": "ours, float32", "us": 10, "us_waited_for": 20, "event_rate": 0.1, "macs_effective": 5000, "against r": 4},
        step | {"engine": "r", "us": 40, "us_waited_for": 50, "against r": 1},
        {"figure": "epoch", "windows": 207, "steps": 70, "batch": 64, "layers": 3, "dtype": "float32", "seconds": 4.25},
    ]  # fmt: skip
    path = folder / "gpu-2025-01-01-a.jsonl"
    path.write_text("".join(json.dumps(about | line) + "\n" for line in lines))
    table = training.on_a_gpu()
    assert "| 1350, 64 | float32 | **ours, EGRU** | 2.00 | 1.50x |  |  |" in table
    assert "| 1350, 64 | float32, TF32 | nn.GRU (cuDNN) | 3.00 | 1.00x |  |  |" in table
    assert "| **ours, float32** | 10.0% | 5,000 | 10.0 | 20.0 | 4.00x |" in table
    assert "density" not in table  # a part that the budget did not reach
    assert "3 layers of 1350 units, float32: **4.2 s**." in table
    assert table.endswith("From [gpu-2025-01-01-a.jsonl](../bench/results/a-gpu/gpu-2025-01-01-a.jsonl).")


def test_the_table_and_the_plot_of_pruning_are_made_of_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "ROOT", tmp_path)
    monkeypatch.setattr(pruning, "GRID", tmp_path / "grid.json")
    monkeypatch.setattr(pruning, "LATENCY", tmp_path / "latency.json")
    assert pruning.pruned() == "Not measured yet."

    def point(
        method: str, seed: int, bits: float, us: float, cell: str = "egru", hidden: int = 512, decoder: float = 1
    ) -> dict[str, object]:
        config = {"cell": cell, "hidden": hidden, "method": method, "density": 0.1, "seed": seed, "steps": 1800}
        config["decoder"] = decoder
        return {
            "config": config, "test_bits_per_char": bits, "density": {"1.weight_hh_l0": 0.1}, "event_rate": 0.08,
            "macs": {"macs_effective": 20000}, "latency_us": {"p50": us},
        }  # fmt: skip

    found = [point("glp", 0, 1.75, 4.0), point("glp", 1, 1.85, 5.0), point("4x4", 0, 1.9, 6.0)]
    found.append(point("dense", 0, 1.7, 9.0, "gru"))
    found += [point("dense", 0, 1.95, 7.0, hidden=64), point("16x1", 0, 1.96, 8.0, decoder=0.3)]
    (tmp_path / "grid.json").write_text(json.dumps({str(i): p for i, p in enumerate(found)}))
    latency = {str(i): p["latency_us"] for i, p in enumerate(found)} | {"3/ONNX Runtime": {"p50": 20.0}}
    timed = {"provenance": {"processor": "A Processor"}, "latency_us": latency}
    (tmp_path / "latency.json").write_text(json.dumps(timed))
    table = pruning.pruned()
    assert "| egru 512 | glp | 10.0% | **1.800** | 2 | 8.0% | 20,000 | 4.50 |" in table
    assert "| egru 512 | 4x4 | 10.0% | 1.900 | 1 | 8.0% | 20,000 | 6.00 |" in table
    assert "| gru 512 | dense | 10.0% | **1.700** | 1 |  | 20,000 | 9.00 (ONNX Runtime 20.0) |" in table
    assert "| egru 512 | 16x1, decoder 30% | 10.0% | 1.960 | 1 | 8.0% | 20,000 | 8.00 |" in table
    assert "| egru 64 | 20,000 | 1.950 | egru 512, glp, 10.0% | 20,000 | 1.800 | 2 |" in table
    assert "1800 steps. A Processor, one thread, pinned, one race of all." in table
    assert "From [grid.json](../grid.json) and [latency.json](../latency.json)." in table
    drawn = pruning.pruned_svg()
    assert drawn.count("<title>") == 10 and "egru 512, glp, 10.0%: 1.800 bits, 4.50 µs" in drawn


def test_the_table_and_the_plot_of_both_sparsities_are_made_of_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "ROOT", tmp_path)
    monkeypatch.setattr(language, "MULTIPLY", tmp_path / "ptb.json")
    assert language.multiplied() == "Not measured yet."

    def point(cell: str, units: int, test: float, macs: int, density: float = 1.0) -> dict[str, object]:
        parts = [{"role": "decoder", "macs_effective": macs / 2}, {"role": "recurrent", "macs_effective": macs / 2}]
        return {
            "cell": cell, "hidden": units, "layers": 1, "rate": 0.1, "test_perplexity": test, "valid_perplexity": test + 1,
            "event_rate": 0.08, "density": {"1.weight_hh_l0": density, "2.weight": 0.25},
            "macs": {"macs_effective": macs, "macs_dense": 8_000_000, "parts": parts}, "memory_bytes": 5_400_000,
        }  # fmt: skip

    points = {
        "lstm-512": point("lstm", 512, 105, 7_000_000), "lstm-128": point("lstm", 128, 120, 2_000_000),
        "lstm-512-cutoffs9": point("lstm", 512, 99, 7_000_000), "event": point("egru", 512, 110, 200_000, 0.1),
        "event-cutoffs9": point("egru", 512, 130, 100_000, 0.1),
    }  # fmt: skip
    points["event-cutoffs9"]["density"]["2.head.weight"] = 0.5  # type: ignore[index]
    times = [("lstm-512", "sparsefold", 500), ("lstm-512", "ONNX Runtime", 1000), ("lstm-512", "torch int8", 400),
             ("lstm-128", "sparsefold", 90), ("lstm-128", "OpenVINO", 100), ("event", "sparsefold", 20)]  # fmt: skip
    race = [{"network": n, "engine": e, "latency_us": {"p50": us}} for n, e, us in times]
    scored = {"scores": True, "latency_us": {"p50": 1, "mean": 10}}
    race += [{"network": f"{n}-cutoffs9", "engine": "sparsefold", **scored} for n in ("lstm-512", "event")]
    about = {"corpus": {"source": "a corpus"}, "provenance": {"processor": "A Processor", "isa": "avx2"}}
    (tmp_path / "ptb.json").write_text(json.dumps({"points": points, "race": race, **about}))
    table = language.multiplied()
    dense = "| lstm 512 | 100% | 25% |  | 106.0 | 105.0 | 8,000,000 | 3,500,000 | 1.0x | 5 | 500.0 | 1000 | 400 "
    assert f"{dense}| 2.0x | 0.8x |  |" in table
    event = (
        "| egru 512 | 10% | 25% | 8.0% | 111.0 | 110.0 | 200,000 | 100,000 | 40.0x | 5 | 20.0 |  |  | 50.0x | 20.0x "
    )
    assert f"{event}| 20.0x (lstm-512) |" in table, "of two dense networks only the larger is as good"
    adaptive = "| egru 512, adaptive 9 | 10% | 50% | 8.0% | 131.0 | 130.0 | 100,000 | 50,000 | 80.0x | 5 | 10.0 |  |  "
    assert f"{adaptive}| 100.0x | 40.0x | 10.0x (lstm-128) |" in table, "the mean of scores"
    assert "ratios are to lstm-512, the dense network with the lowest test perplexity of those that other" in table
    assert (
        "to say log p of the word that follows, else the median time to give the logits of all words. A Proc" in table
    )
    chosen = language.words()
    assert "| EGRU 512 | 110.0 | 8.0% | 10% | 200,000 | 20 |  |  |" in chosen, "at most a twentieth worse"
    assert "adaptive 9" in chosen and "40.0 times fewer multiplications, 50.0 times less time" in chosen
    drawn = language.multiply_svg()
    assert drawn.count("<circle") == 7 and "egru 512, 8% events, 10%" in drawn and "lstm 128, fastest rival" in drawn


def test_links_lead_somewhere() -> None:
    import re

    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_stub_matches_the_extension(tmp_path: Path) -> None:
    pytest.importorskip("nanobind", reason="nanobind makes the stub to compare with")
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff formats the stub; it is not installed here.")
    made = tmp_path / "_native.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "sparsefold._native", "-o", str(made)]
    subprocess.run(command, check=True)
    subprocess.run([str(ruff), "format", "-q", "--config", str(ROOT / "pyproject.toml"), str(made)], check=True)
    committed = (ROOT / "src/sparsefold/_native.pyi").read_text()
    assert made.read_text() == committed, "run 'make stub' and commit src/sparsefold/_native.pyi"
