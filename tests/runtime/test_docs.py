"""Tables in README and docs are what docs/generate.py makes of the committed results; the stub is what the extension says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_tables_are_generated(page: str) -> None:
    generate = generator()
    text = (ROOT / page).read_text()
    assert generate.render(text, generate.SECTIONS[page]) == text, f"{page} is not what 'make docs' writes"


def test_figures_are_generated() -> None:
    generate = generator()
    for page, make in generate.FIGURES.items():
        assert (ROOT / page).read_text() == make(), f"{page} is not what 'make docs' writes"


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
