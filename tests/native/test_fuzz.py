"""The reader fuzzed under the sanitizers: ten seconds, a minute in CI; and Python's verdict on what the fuzzer made."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import cases
from attacks import make
from sparsefold.program import Program, ProgramError

ATTACKS = Path(make.__file__).parent


def test_no_file_makes_the_reader_stumble(sanitized, tmp_path: Path) -> None:
    fuzz = sanitized("address,undefined", ["tests/native/fuzz_load.cpp"], "fuzz_load")
    corpus, kept = tmp_path / "corpus", tmp_path / "kept"
    corpus.mkdir()
    kept.mkdir()
    for i in range(60):  # as often as an attack, or hardly any file would get past the header
        (corpus / f"sound{i}.sfold").write_bytes(make.SOUND)
    for name in (*cases.NETWORKS, *cases.WHOLE_SEQUENCES):
        if len(raw := cases.network(name).to_bytes()) < 20_000:
            (corpus / f"{name}.sfold").write_bytes(raw)
    files = [*sorted(ATTACKS.glob("*.sfold")), *sorted(corpus.iterdir())]
    seconds = 60 if os.environ.get("CI") == "true" else 10
    done = subprocess.run(
        [fuzz, str(seconds), "1", kept, *files], capture_output=True, text=True, timeout=seconds + 240, check=False
    )
    crash = (kept / "crash").read_bytes() if (kept / "crash").exists() else b""
    assert done.returncode == 0, f"keep these bytes in tests/attacks: {crash!r}\n{done.stderr}"
    sound, broken = map(int, re.findall(r"\d+", done.stdout))
    assert sound > 100 and broken > 100, done.stdout
    for path in kept.iterdir():
        try:
            Program.from_bytes(path.read_bytes())
            verdict = ".sound"
        except ProgramError:
            verdict = ".broken"
        assert verdict == path.suffix, path.read_bytes()
