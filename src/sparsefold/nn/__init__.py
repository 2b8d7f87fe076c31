"""Recurrent cells that speak in events, for training in torch."""

from .activity import Activity
from .adaptive import AdaptiveDecoder
from .events import Triangle, event
from .gated import GRU, LSTM, RNN
from .kwta import KWTA
from .modules import EGRU, CausalConv1d, EGRUCell, EGRUState, Stack, StackState, anneal, param_groups
from .shrinking import shrink

__all__ = [
    "EGRU",
    "GRU",
    "KWTA",
    "LSTM",
    "RNN",
    "Activity",
    "AdaptiveDecoder",
    "CausalConv1d",
    "EGRUCell",
    "EGRUState",
    "Stack",
    "StackState",
    "Triangle",
    "anneal",
    "event",
    "param_groups",
    "shrink",
]
