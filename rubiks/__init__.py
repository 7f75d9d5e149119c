"""RubiksNet: efficient video action recognition with a learnable 3D shift (ECCV 2020)."""

from typing import TYPE_CHECKING, Any

from rubiks.version import VERSION

if TYPE_CHECKING:
    from rubiks.models.rubiksnet import RubiksNet
    from rubiks.predict.predictor import Predictor

__version__ = VERSION
__all__ = ["Predictor", "RubiksNet", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: PyTorch takes seconds, and `rubiks --help` does not need it."""
    if name == "RubiksNet":
        from rubiks.models.rubiksnet import RubiksNet

        return RubiksNet
    if name == "Predictor":
        from rubiks.predict.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
