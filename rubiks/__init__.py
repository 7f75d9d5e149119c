"""RubiksNet: efficient video action recognition with a learnable 3D shift (ECCV 2020)."""

from typing import TYPE_CHECKING, Any

from rubiks.version import VERSION

if TYPE_CHECKING:
    from rubiks.models.rubiksnet import RubiksNet

__version__ = VERSION
__all__ = ["RubiksNet", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the network when it is asked for: PyTorch takes seconds, and `rubiks --help` does not need it."""
    if name == "RubiksNet":
        from rubiks.models.rubiksnet import RubiksNet

        return RubiksNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
