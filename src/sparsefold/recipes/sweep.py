"""Search over a recipe's settings: ``sparsefold sweep RECIPE grid.toml``, on Optuna, by any number of processes and machines.

The file says what to search::

    minutes = 5                                      # one value: the same in every trial
    cell = ["gru", "egru"]                           # a list: one of these
    lr = { low = 1e-3, high = 2e-2, log = true }     # a range, of whole numbers where both ends are; step = n, if wanted

Lists alone are a grid, of which every point is run once; with a range Optuna proposes ``--trials`` points. Whoever opens the same
storage works on the same study. Each trial trains in a folder named for its settings, so that one that was stopped or killed
goes on when it is tried again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsefold.program import write_atomically
from sparsefold.recipes._checkpoint import make_folder
from sparsefold.recipes._config import override
from sparsefold.recipes.names import RECIPES

TRIALS = 20


def read_space(path: Path) -> dict[str, Any]:
    """The search space of a file: by setting a value, a list of values, or a range.

    Raises:
        ValueError: no TOML, nothing to search, or a range that is none.
    """
    try:
        space = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error
    for key, value in space.items():
        if isinstance(value, dict):
            ends: list[Any] = [value.get("low"), value.get("high")]
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in ends)
            if not numbers or ends[0] > ends[1] or set(value) - {"low", "high", "log", "step"}:
                raise ValueError(
                    f"{path}: a range is {{ low = 1, high = 9 }}, also with log or step; {key} is {value}."
                )
        if isinstance(value, list) and not value:
            raise ValueError(f"{path}: {key} has no values to choose from.")
    if not any(isinstance(value, list | dict) for value in space.values()):
        raise ValueError(f"{path} has nothing to search: give a setting a list of values, or a range.")
    return space


def sweep(recipe: str, space: Mapping[str, Any], folder: Path, storage: str = "", trials: int | None = None) -> Any:
    """Run trials until the study has as many as wanted, and return it; ``sweep.json`` in the folder holds all of them.

    Args:
        recipe: its name.
        space: what ``read_space`` gives.
        folder: a folder for each trial is made in it.
        storage: a file (``.db`` or ``.sqlite``: SQLite, else Optuna's journal) or the URL of a database; empty: a journal in
            ``folder``.
        trials: of all workers together; None: every point of a grid, or ``TRIALS``.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: an unknown recipe or setting, a storage that cannot be opened, or a study of another space.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("a sweep needs Optuna: pip install 'sparsefold[sweep]'.") from error
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}. Recipes: {', '.join(RECIPES)}.")
    module = RECIPES[recipe]
    for point in itertools.islice(_grid({k: _ends(v) for k, v in space.items()}), 1000):
        override(module.Config(), _words(space, point))  # wrong settings are said before any training
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make_folder(folder)
    study = optuna.create_study(
        storage=_storage(optuna, storage or str(folder / "sweep.journal")), study_name=f"sparsefold {recipe}",
        direction="minimize", load_if_exists=True,
    )  # fmt: skip
    described = json.dumps(space, sort_keys=True)
    if study.user_attrs.get("space", described) != described:
        raise ValueError(
            "this storage holds a sweep of the same recipe over another space. Name another with --storage."
        )
    study.set_user_attr("space", described)
    is_grid = not any(isinstance(value, dict) for value in space.values())
    _revive(optuna, study)
    if is_grid:
        for point in _grid(space):
            study.enqueue_trial(point, skip_if_exists=True)
    wanted = len(list(_grid(space))) if is_grid else TRIALS
    wanted = wanted if trials is None else min(trials, wanted) if is_grid else trials
    while _count(optuna, study) < wanted:
        trial = study.ask()
        point = {key: _suggest(trial, key, value) for key, value in space.items() if isinstance(value, list | dict)}
        if is_grid and _known(optuna, study, trial, point):  # another worker was quicker
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            break
        trial.set_user_attr("worker", _worker())
        _run(optuna, study, trial, module, _words(space, point), folder, f"{recipe} {trial.number + 1}/{wanted}")
        _write(study, folder)
    _write(study, folder)
    return study


def _run(optuna: Any, study: Any, trial: Any, module: Any, words: list[str], folder: Path, label: str) -> None:
    states = optuna.trial.TrialState
    name = ",".join(words).replace("/", "_")[-200:]
    try:
        summary = module.run(override(module.Config(), words), folder / name, label)
    except FloatingPointError as error:  # a result too
        trial.set_user_attr("failed", str(error))
        study.tell(trial, state=states.FAIL)
        return
    except KeyboardInterrupt:
        study.tell(trial, state=states.FAIL)
        study.enqueue_trial(trial.params)
        raise
    write_atomically(folder / name / "summary.json", json.dumps(summary, indent=1).encode())
    trial.set_user_attr("folder", name)
    study.tell(trial, next(float(v) for k, v in summary.items() if k.startswith("valid_") and isinstance(v, float)))


def table(study: Any) -> str:
    """Trials, the best first."""
    done = sorted((t for t in study.trials if t.value is not None), key=lambda t: t.value)
    lines = [f"{t.value:10.4f}  " + " ".join(f"{k}={v}" for k, v in t.params.items()) for t in done]
    failed = sum("failed" in t.user_attrs for t in study.trials)
    return "\n".join(lines) + (f"\n{failed} diverged." if failed else "")


def _grid(space: Mapping[str, Any]) -> Any:
    axes = {key: value for key, value in space.items() if isinstance(value, list)}
    return (dict(zip(axes, choice, strict=True)) for choice in itertools.product(*axes.values()))


def _ends(value: Any) -> Any:
    return [value["low"], value["high"]] if isinstance(value, dict) else value


def _words(space: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    return [f"{key}={point.get(key, value)}" for key, value in space.items()]


def _suggest(trial: Any, key: str, value: Any) -> Any:
    if isinstance(value, list):
        return trial.suggest_categorical(key, value)
    whole = isinstance(value["low"], int) and isinstance(value["high"], int)
    options = {k: v for k, v in value.items() if k in ("log", "step")}
    return (trial.suggest_int if whole else trial.suggest_float)(key, value["low"], value["high"], **options)


def _storage(optuna: Any, name: str) -> Any:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in name:
            return RDBStorage(name)
        if Path(name).suffix in (".db", ".sqlite", ".sqlite3"):
            return RDBStorage(f"sqlite:///{name}", engine_kwargs={"connect_args": {"timeout": 60}})
        return JournalStorage(JournalFileBackend(name))
    except Exception as error:  # of whatever database it is
        raise ValueError(f"cannot open the storage {name}: {str(error).partition(chr(10))[0]}.") from error


def _worker() -> str:
    return f"{platform.node()} {os.getpid()}"


def _revive(optuna: Any, study: Any) -> None:
    """Give back trials of workers of this machine that are no more: they go on in their folders."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        node, _, pid = trial.user_attrs.get("worker", "").rpartition(" ")
        if node == platform.node() and not _alive(int(pid)):
            study.tell(trial.number, state=states.FAIL)
            study.enqueue_trial(trial.params)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _count(optuna: Any, study: Any) -> int:
    """Trials that are finished or being run."""
    states = optuna.trial.TrialState
    counted = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.RUNNING))
    return len(counted) + sum("failed" in t.user_attrs for t in study.get_trials(deepcopy=False, states=(states.FAIL,)))


def _known(optuna: Any, study: Any, own: Any, point: Mapping[str, Any]) -> bool:
    states = optuna.trial.TrialState
    others = [t for t in study.get_trials(deepcopy=False) if t.number < own.number]
    return any(
        t.params == point and (t.state in (states.COMPLETE, states.RUNNING) or "failed" in t.user_attrs) for t in others
    )


def _write(study: Any, folder: Path) -> None:
    trials = [
        {"number": t.number, "state": t.state.name, "value": t.value, "params": t.params, **t.user_attrs}
        for t in study.trials
    ]
    write_atomically(folder / "sweep.json", json.dumps(trials, indent=1).encode())
