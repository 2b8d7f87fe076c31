"""Exported C on a microcontroller: compiled for a Cortex-M4, played in emulation, its bytes and its instructions counted.

Needs ``arm-none-eabi-gcc`` with newlib, and ``qemu-system-arm``. Nothing is timed: an emulator knows no cycles.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsefold.export_c import write_c
from sparsefold.program import Program

BENCH = Path(__file__).resolve().parent
TOOLS = "arm-none-eabi-gcc", "arm-none-eabi-size", "qemu-system-arm"
TARGET = [
    "-mcpu=cortex-m4",
    "-mthumb",
    "-mfloat-abi=hard",
    "-mfpu=fpv4-sp-d16",
    "-ffunction-sections",
    "-Wl,--gc-sections",
]
OPTIMISED = "-O2"
INSTRUCTIONS_PER_TICK = 40  # of SysTick at 25 MHz, one instruction being a nanosecond
LIMIT = 120  # seconds of emulation


@dataclass(frozen=True)
class Played:
    """Outputs (T, O) of all steps, instructions of a step, bytes of machine code and constants, and of memory for its state."""

    outputs: NDArray[np.float32]
    instructions: float
    flash: int
    ram: int


def play(program: Program, inputs: NDArray[np.float32] | NDArray[np.int64]) -> Played:
    """Plays ``inputs``, (T, I) values or (T,) tokens, from the beginning.

    Raises:
        RuntimeError: a tool complained, or the program did not come to its end.
    """
    tokens = program.takes_tokens
    rows = inputs.reshape(len(inputs), -1)
    words = ",\n".join(
        "{" + ",".join(str(v) if tokens else float(v).hex() + "f" for v in row) + "}" for row in rows.tolist()
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_c(program, folder, "net")
        kind = "uint32_t" if tokens else "float"
        defined = [f"#define INPUT {kind}", f"#define INPUT_SIZE {rows.shape[1]}", f"#define STEPS {len(rows)}"]
        defined += ["#define STRAIGHT"] * tokens + ["#define INPUTS {" + words.replace("\n", "\\\n") + "}"]
        (folder / "played.h").write_text("\n".join(defined) + "\n")
        sources = [str(BENCH / "cortex_m4.c"), str(folder / "net.c")]
        linked = [
            "-nostartfiles",
            "--specs=nosys.specs",
            "-T",
            str(BENCH / "cortex_m4.ld"),
            "-lm",
            "-o",
            str(folder / "net.elf"),
        ]
        _shell("arm-none-eabi-gcc", "-std=gnu99", OPTIMISED, *TARGET, "-I", name, *sources, *linked)
        _shell("arm-none-eabi-gcc", "-std=gnu99", OPTIMISED, *TARGET, "-c", sources[1], "-o", str(folder / "net.o"))
        text, data = map(int, _shell("arm-none-eabi-size", str(folder / "net.o")).splitlines()[1].split()[:2])
        (folder / "size.c").write_text('#include "net.h"\nchar state[sizeof(net_state)];\n')
        _shell("arm-none-eabi-gcc", *TARGET, "-I", name, "-c", str(folder / "size.c"), "-o", str(folder / "size.o"))
        ram = int(_shell("arm-none-eabi-size", str(folder / "size.o")).splitlines()[1].split()[2])
        board = ["-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none", "-icount", "shift=0"]
        said = _shell("qemu-system-arm", *board, "-semihosting", "-kernel", str(folder / "net.elf"))
    *outputs, ticks = (int(word, 16) for word in said.split())
    if len(outputs) != len(rows) * program.outputs:
        raise RuntimeError(
            f"{len(outputs)} values were printed, not {len(rows) * program.outputs}: the program stopped before its end."
        )
    values = np.array(outputs, np.uint32).view(np.float32).reshape(len(rows), program.outputs)
    return Played(values, ticks * INSTRUCTIONS_PER_TICK / len(rows), text + data, ram)


def _shell(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ended with status {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr  # semihosting prints where the emulator likes
