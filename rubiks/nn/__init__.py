"""The modules that RubiksNet is made of."""

from rubiks.nn.attention import AttentionShift
from rubiks.nn.block import RubiksBlock
from rubiks.nn.normalize import Normalize
from rubiks.nn.shift import LearnableShift

__all__ = ["AttentionShift", "LearnableShift", "Normalize", "RubiksBlock"]
