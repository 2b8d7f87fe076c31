"""The native core under the address, undefined-behaviour and thread sanitizers, as a program of its own, without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-w"],
}


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_core_runs_clean(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("g++ is not installed: the sanitizers need it.")
    common = [
        compiler,
        "-std=c++17",
        "-O1",
        "-g",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-DSPARSEFOLD_X86=1",
    ]
    probe = tmp_path / "probe.cpp"
    probe.write_text("#if !defined(__x86_64__)\n#error\n#endif\nint main() {}\n")
    if subprocess.run(
        [*common, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False
    ).returncode:
        pytest.skip(f"this machine's g++ cannot link -fsanitize={sanitizer} for x86-64.")
    sources = {ROOT / "native" / f"{name}.cpp": [] for name in ("dispatch", "program", "engine")}
    sources |= {ROOT / "native" / f"isa_{isa}.cpp": flags for isa, flags in FLAGS.items()}
    sources[ROOT / "tests/native/stress.cpp"] = []
    objects, running = [], []
    for source, flags in sources.items():
        objects.append(str(tmp_path / f"{source.stem}.o"))
        running.append(subprocess.Popen([*common, *flags, "-c", str(source), "-o", objects[-1]]))
        if len(running) == 2:
            assert all(p.wait() == 0 for p in running)
            running = []
    assert all(p.wait() == 0 for p in running)
    subprocess.run([*common, *objects, "-o", str(tmp_path / "stress")], check=True)
    done = subprocess.run([str(tmp_path / "stress")], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"
