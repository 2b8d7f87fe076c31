"""The cells of `reference.py` on a GPU, by Triton and torch's own products: same names and signatures.

Triton is imported when a kernel is first needed and compiles it when it first runs. The RNN is the reference's own.
"""

from ..reference import rnn
from .gru import egru, gru
from .lstm import lstm
from .stream import Stream
from .window import available

__all__ = ["Stream", "available", "egru", "gru", "lstm", "rnn"]
