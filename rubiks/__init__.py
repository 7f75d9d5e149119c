"""RubiksNet: efficient video action recognition with a learnable 3D shift (ECCV 2020)."""

from rubiks.models.rubiksnet import RubiksNet

__version__ = "0.1.0"
__all__ = ["RubiksNet", "__version__"]
