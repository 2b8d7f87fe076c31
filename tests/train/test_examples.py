"""What the pages show works: every example, every Python block of the README, every command that a page names."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from sparsefold.cli import _parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOT_RUN = "<!-- not run -->"


def blocks(page: Path, *languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages, without those under a comment that says they are not run."""
    text = page.read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [m[2] for m in found if m[1] in languages and not text[: m.start()].rstrip().endswith(NOT_RUN)]


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every command of ours in a shell block, and of every `make …` named inside a line."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "sh", "console", "bash") for line in block.splitlines()]
        lines += re.findall(r"`(make [^`\n]+)`", page.read_text())
        found += [(page.name, line.removeprefix("$ ")) for line in lines]
    return [(page, line) for page, line in found if line.startswith(("make ", "sparsefold "))]


@pytest.fixture(autouse=True)
def torch_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(path), run_name="example")["main"]
    main(**({"steps": 20} if "steps" in inspect.signature(main).parameters else {}))
    assert capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == [], "an example cleans up"


def test_the_streaming_example_makes_text(tmp_path, capsys):
    text = runpy.run_path(str(ROOT / "examples" / "stream_text.py"))["main"](steps=5)
    assert len(text) == 200
    assert f"The {text}" in capsys.readouterr().out


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_readme_code_runs(number, tmp_path, monkeypatch, capsys):
    code = blocks(ROOT / "README.md", "python")[number]
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    exec(compile(code, f"README.md, block {number}", "exec"), {"__name__": "__main__"})


def test_readme_shows_the_main_job():
    shown = "\n".join(blocks(ROOT / "README.md", "python"))
    for name in ("nn.EGRU(", "sparsify.Pruner(", ".penalty(", "compile_model(", "Engine.load(", ".step("):
        assert name in shown
    lines = [line for page, line in commands() if page == "README.md"]
    assert {"make demo", "make test"} <= {" ".join(shlex.split(line, comments=True)) for line in lines}


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_on_a_page_exists(page, line, capsys):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        variables = set(re.findall(r"^(\w+) *[?:]?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
        for word in words[1:]:
            name, equals, _ = word.partition("=")
            assert name in (variables if equals else targets), f"the Makefile knows no {name}"
        return
    try:
        args, extra = _parser().parse_known_args(words[1:])
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    if getattr(args, "recipe", None):
        from sparsefold.recipes._config import override
        from sparsefold.recipes.names import RECIPES

        override(RECIPES[args.recipe].Config(), [*args.overrides, *extra])
    else:
        assert extra == []
