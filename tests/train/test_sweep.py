"""Sweeps: spaces from a file, grids and ranges, storages that are shared, and what goes on after a kill."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsefold.cli import main
from sparsefold.recipes import sweep as module
from sparsefold.recipes.names import RECIPES
from sparsefold.recipes.sweep import read_space, sweep, table

pytest.importorskip("optuna", reason="sweeps need Optuna: pip install 'sparsefold[sweep]'.")


@dataclass(frozen=True)
class Config:
    lr: float = 0.1
    cell: str = "gru"
    units: int = 4


@pytest.fixture
def ran(monkeypatch):
    """A recipe that trains nothing, and the folders and configs that it was run with."""
    calls: list[tuple[Path, Config]] = []

    def run(config: Config, folder: Path, label: str) -> dict:
        calls.append((folder, config))
        folder.mkdir(parents=True, exist_ok=True)
        return {"valid_perplexity": config.units + abs(config.lr - 0.3) + (config.cell == "lstm"), "steps": 1}

    recipe = types.SimpleNamespace(Config=Config, run=run, load=None)
    monkeypatch.setitem(RECIPES, "toy", recipe)
    calls_of = types.SimpleNamespace(calls=calls, recipe=recipe)
    return calls_of


def space(tmp_path: Path, text: str) -> dict:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return read_space(path)


GRID = 'lr = [0.1, 0.3]\ncell = ["gru", "lstm"]\nunits = 7\n'
RANGE = "lr = { low = 0.01, high = 1.0, log = true }\nunits = { low = 2, high = 6, step = 2 }\n"


@pytest.mark.parametrize("storage", ["", "a.db", "b.journal"])
def test_a_grid_runs_each_point_once_whoever_opens_it(storage, ran, tmp_path):
    where = str(tmp_path / storage) if storage else ""
    study = sweep("toy", space(tmp_path, GRID), tmp_path / "out", where, trials=3)
    assert len(ran.calls) == 3
    study = sweep("toy", space(tmp_path, GRID), tmp_path / "out", where)
    assert {(c.lr, c.cell, c.units) for _, c in ran.calls} == {
        (lr, cell, 7) for lr in (0.1, 0.3) for cell in ("gru", "lstm")
    }
    assert len(ran.calls) == len({f for f, _ in ran.calls}) == 4
    assert study.best_params == {"lr": 0.3, "cell": "gru"}
    sweep("toy", space(tmp_path, GRID), tmp_path / "out", where)
    assert len(ran.calls) == 4, "nothing is left to do"
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [t["state"] for t in written].count("COMPLETE") == 4
    assert table(study).splitlines()[0].split() == ["7.0000", "lr=0.3", "cell=gru"]


def test_a_range_is_searched_for_as_many_trials_as_asked_for(ran, tmp_path):
    sweep("toy", space(tmp_path, RANGE), tmp_path / "out", trials=5)
    sweep("toy", space(tmp_path, RANGE), tmp_path / "out", trials=8)
    assert len(ran.calls) == 8
    assert all(0.01 <= c.lr <= 1 and c.units in (2, 4, 6) for _, c in ran.calls)


def test_a_trial_that_was_stopped_or_killed_goes_on_in_its_folder(ran, tmp_path, monkeypatch):
    work, stopped = ran.recipe.run, []

    def stop(config: Config, folder: Path, label: str) -> dict:
        if len(ran.calls) == 1 and not stopped:
            stopped.append(folder)
            raise KeyboardInterrupt("stopped after step 3")
        return work(config, folder, label)

    ran.recipe.run = stop
    with pytest.raises(KeyboardInterrupt):
        sweep("toy", space(tmp_path, GRID), tmp_path / "out")
    monkeypatch.setattr(module, "_worker", lambda: f"{module.platform.node()} 999999999")  # one that is no more

    def kill(config: Config, folder: Path, label: str) -> dict:
        if len(ran.calls) == 2:
            stopped.append(folder)
            raise SystemExit("as if killed: nobody tells the study")
        return work(config, folder, label)

    ran.recipe.run = kill
    with pytest.raises(SystemExit):
        sweep("toy", space(tmp_path, GRID), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setitem(RECIPES, "toy", types.SimpleNamespace(Config=Config, run=work, load=None))
    sweep("toy", space(tmp_path, GRID), tmp_path / "out")
    assert len(ran.calls) == 4
    assert set(stopped) <= {f for f, _ in ran.calls}, "they were run again"


def test_a_trial_that_diverges_is_counted_and_the_others_go_on(ran, tmp_path):
    work = ran.recipe.run

    def run(config: Config, folder: Path, label: str) -> dict:
        summary = work(config, folder, label)
        if config.lr == 0.3:
            raise FloatingPointError("training diverged")
        return summary

    ran.recipe.run = run
    study = sweep("toy", space(tmp_path, GRID), tmp_path / "out")
    assert len(ran.calls) == 4
    assert table(study).endswith("2 diverged.")
    sweep("toy", space(tmp_path, GRID), tmp_path / "out")
    assert len(ran.calls) == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr = 0.1", r"has nothing to search"),
        ("lr = [", r"is not TOML"),
        ("lr = []", r"lr has no values"),
        ("lr = { low = 2, high = 1 }", r"a range is"),
        ("lr = { low = 1 }", r"a range is"),
        ("lr = { low = 1, high = 2, size = 3 }", r"a range is"),
    ],
)
def test_a_space_that_is_none_gets_a_sentence(text, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        space(tmp_path, text)
    with pytest.raises(ValueError, match=r"^cannot read .*missing.toml"):
        read_space(tmp_path / "missing.toml")


def test_wrong_settings_and_other_spaces_are_refused_before_any_training(ran, tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'rl'. Did you mean lr"):
        sweep("toy", space(tmp_path, "rl = [1, 2]"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"units must be a whole number"):
        sweep("toy", space(tmp_path, "units = [1, 2.5]"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"there is no recipe 'try'"):
        sweep("try", space(tmp_path, GRID), tmp_path / "out")
    sweep("toy", space(tmp_path, GRID), tmp_path / "out", trials=1)
    with pytest.raises(ValueError, match=r"another space"):
        sweep("toy", space(tmp_path, RANGE), tmp_path / "out")
    with pytest.raises(ValueError, match=r"^cannot open the storage nonsense://"):
        sweep("toy", space(tmp_path, GRID), tmp_path / "other", "nonsense://x")
    assert len(ran.calls) == 1


def test_the_command(ran, tmp_path, capsys, monkeypatch):
    (tmp_path / "grid.toml").write_text(GRID)
    assert main(["sweep", "toy", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")]) == 0
    assert "lr=0.3 cell=gru" in capsys.readouterr().out.splitlines()[0]
    assert (tmp_path / "out" / "sweep.json").exists()
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["sweep", "toy", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'sparsefold[sweep]'" in capsys.readouterr().err
