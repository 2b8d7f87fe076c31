"""sparsefold: recurrent networks that are sparse twice. Few weights exist, few units speak, and the clock shows it.

What is imported here is the runtime: numpy and one native library. Training needs the extra ``train``:
``sparsefold.nn``, ``sparsefold.sparsify`` and :func:`compile_model` import torch when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsefold.calibrate import Calibration, calibrate_delta
from sparsefold.cost import Cost, Counts, cost
from sparsefold.engine import Engine, Stream, interpret
from sparsefold.formats import CSC, Block, Complementary, Dense
from sparsefold.program import Program, ProgramError

if TYPE_CHECKING:
    from sparsefold.lowering import compile_model

__version__ = "0.1.0"
__all__ = [
    "CSC",
    "Block",
    "Calibration",
    "Complementary",
    "Cost",
    "Counts",
    "Dense",
    "Engine",
    "Program",
    "ProgramError",
    "Stream",
    "calibrate_delta",
    "compile_model",
    "cost",
    "interpret",
]


def __getattr__(name: str) -> Any:
    if name == "compile_model":
        try:
            from sparsefold.lowering import compile_model
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError("compile_model needs torch: pip install 'sparsefold[train]'.") from error
        return compile_model
    raise AttributeError(f"module 'sparsefold' has no attribute {name!r}")
