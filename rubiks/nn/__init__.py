"""The modules that RubiksNet is made of."""

from rubiks.nn.attention import AttentionShift
from rubiks.nn.block import RubiksBlock
from rubiks.nn.normalize import Normalize
from rubiks.nn.shift import ChannelShift, FixedTimeShift, GroupedShift, LearnableShift, QuantizedShift

__all__ = [
    "AttentionShift",
    "ChannelShift",
    "FixedTimeShift",
    "GroupedShift",
    "LearnableShift",
    "Normalize",
    "QuantizedShift",
    "RubiksBlock",
]
