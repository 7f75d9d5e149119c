"""Which backbones the training path can take: those whose modules are as `Backbone` makes them, in training mode."""

from __future__ import annotations

from torch import nn

from rubiks.models.backbone import Backbone
from rubiks.nn import AttentionShift, FixedTimeShift, GroupedShift, LearnableShift, RubiksBlock
from rubiks.nn.block import SqueezeExcite

BLOCK_MODULES = {
    RubiksBlock,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Sequential,
    AttentionShift,
    LearnableShift,
    FixedTimeShift,
    GroupedShift,
    SqueezeExcite,
    nn.Linear,
    nn.ReLU,
    nn.Sigmoid,
}


def supports(backbone: nn.Module) -> bool:
    """Whether the training path computes what the backbone's modules would compute now.

    Frozen stages may be anything, as they are run by their modules; some stage is not frozen. All other modules are in
    training mode and of the types that `Backbone` makes. Batch norms have a scale, an offset and
    running statistics, updated with a fixed momentum. Modules of other types (such as `nn.SyncBatchNorm`) and hooks,
    which would not be called, are not supported. The last norm may be any module.
    """
    if type(backbone) is not Backbone or _is_altered(backbone):
        return False
    trained = backbone.layers()[backbone.frozen_stages :]
    return (
        len(trained) > 0
        and (backbone.frozen_stages > 0 or _is_supported_stem(backbone.conv1))
        and all(supports_block(block) for layer in trained for block in layer)
    )


def _is_supported_stem(stem: nn.Module) -> bool:
    return type(stem) is nn.Conv2d and _is_plain(stem, kernel=3, stride=2, padding=1) and not has_hooks(stem)


def supports_block(block: nn.Module) -> bool:
    """The same of a single block."""
    return isinstance(block, RubiksBlock) and _is_supported(block)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_supported(module: nn.Module) -> bool:
    if type(module) not in BLOCK_MODULES or _is_altered(module):
        return False
    if isinstance(module, nn.BatchNorm2d):
        return _uses_batch_statistics(module)
    if isinstance(module, nn.Linear):
        return module.bias is None and not module._modules
    if isinstance(module, nn.Conv2d):
        return _is_plain(module, kernel=1, stride=module.stride[0], padding=0)
    return all(child is None or _is_supported(child) for child in module._modules.values())


def _is_altered(module: nn.Module) -> bool:
    """Whether calling the module does something else than the forward of its class."""
    return has_hooks(module) or "forward" in vars(module)


def _is_plain(conv: nn.Conv2d, kernel: int, stride: int, padding: int) -> bool:
    """Whether a convolution is square, zero-padded, without bias and groups, and not parametrised."""
    return (
        conv.kernel_size == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and not conv._modules
    )


def _uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm uses the batch's statistics and updates the running ones with a fixed momentum."""
    tracks = norm.training and norm.track_running_stats and norm.running_mean is not None
    return (
        tracks
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
        and norm.weight is not None
        and norm.bias is not None
    )
