"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rubiks.models import RubiksNet
from rubiks.nn import AttentionShift, LearnableShift
from rubiks.ops import normalize_shift_grad
from rubiks.training.recipe import Recipe


def shift_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The offsets of every learnable shift."""
    return [module.shift for module in net.modules() if isinstance(module, LearnableShift)]


def running_statistics(net: nn.Module) -> list[torch.Tensor]:
    """The running means and variances of every batch norm."""
    return [buffer for name, buffer in net.named_buffers() if name.endswith(("running_mean", "running_var"))]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A copy of the values of all tensors, in one tensor."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def write_flat(values: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Write a tensor of the form that `flat` returns into the tensors."""
    parts = values.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def normalize_shifts(shifts: Sequence[nn.Parameter]) -> None:
    """Normalise the gradients of shifts (3 or 2, C) per channel, in few operations for all."""
    gradients = [parameter.grad for parameter in shifts if parameter.grad is not None]
    if gradients:
        channels = [gradient.shape[1] for gradient in gradients]
        normal = normalize_shift_grad(torch.cat(gradients, dim=1))
        torch._foreach_copy_(gradients, list(normal.split(channels, dim=1)))


def parameter_groups(net: RubiksNet, recipe: Recipe, lr: float) -> list[dict]:
    """Every trained parameter once, in named groups with its learning rate and weight decay.

    The groups follow RubiksNet (weights; biases and norms without decay; shifts slower and without decay), plus the AQ
    logits (no decay: it would pull the attention towards uniform) and the classifier (faster if new).
    """
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("weights", "bias and norm", "shift", "attention", "classifier", "classifier bias")
    }
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, LearnableShift):
                name = "shift"
            elif isinstance(module, AttentionShift):
                name = "attention"
            elif module is net.new_fc:
                name = "classifier" if parameter.dim() > 1 else "classifier bias"
            else:
                name = "weights" if parameter.dim() > 1 else "bias and norm"
            groups[name].append(parameter)
    scales = {
        "shift": recipe.shift_lr_scale,
        "attention": recipe.attention_lr_scale,
        "classifier": recipe.classifier_lr_scale,
        "classifier bias": recipe.classifier_lr_scale,
    }
    decays = {"weights": recipe.weight_decay, "classifier": recipe.weight_decay}
    return [
        {"name": name, "params": params, "lr": lr * scales.get(name, 1.0), "weight_decay": decays.get(name, 0.0)}
        for name, params in groups.items()
        if params
    ]


def optimizer(groups: list[dict], recipe: Recipe, fused: bool = True) -> torch.optim.Optimizer:
    """The recipe's optimiser; `fused` takes a step in one kernel, with the gradients as they are."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused)
    chosen = torch.optim.SGD(groups, momentum=recipe.momentum, fused=fused)
    for group in groups if recipe.momentum else ():
        for parameter in group["params"]:  # a skipped first step would leave them uninitialised
            chosen.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return chosen


def change_settings(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR, settings: list[dict], done: int
) -> None:
    """Give each group of an optimiser other settings, `done` steps into the schedule."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for parameter in group["params"]:
            count = optimizer.state[parameter].get("step")
            if count is not None:  # its device depends on the precision, which may have changed
                optimizer.state[parameter]["step"] = count.to(parameter.device if own["fused"] else "cpu")
    schedule.base_lrs = [own["initial_lr"] for own in settings]
    schedule.last_epoch = done
    for group, rate, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(done)


def lr_factor(recipe: Recipe, steps_per_epoch: float) -> Callable[[int], float]:
    """The schedule: a function from the number of optimiser steps taken to the factor on every learning rate."""

    def factor(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < recipe.warmup_epochs:
            return (step + 1) / (recipe.warmup_epochs * steps_per_epoch + 1)
        if recipe.schedule == "step":
            return 0.1 ** sum(epoch >= milestone for milestone in recipe.milestones)
        if recipe.schedule == "cosine":
            span = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - recipe.warmup_epochs) / span)))
        return 1.0

    return factor


def describe_groups(net: RubiksNet, recipe: Recipe, processes: int) -> str:
    """The parameter groups with their resolved learning rates, as a table for the screen."""
    lines = [
        f"{recipe.optimizer}, {recipe.schedule} schedule, {recipe.epochs} epochs, total batch "
        f"{recipe.total_batch(processes)} (recipe.lr={recipe.lr:g} is for {recipe.lr_batch})",
        f"  {'group':<16}{'parameters':>12}{'lr':>12}{'weight decay':>14}",
    ]
    for group in parameter_groups(net, recipe, recipe.scaled_lr(processes)):
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(f"  {group['name']:<16}{count:>12,}{group['lr']:>12.3g}{group['weight_decay']:>14.3g}")
    frozen = sum(parameter.numel() for parameter in net.parameters() if not parameter.requires_grad)
    if frozen:
        lines.append(f"  {'frozen':<16}{frozen:>12,}")
    if recipe.ema_decay is not None:
        lines.append(
            f"  validation and evaluation use the average of the weights (recipe.ema_decay={recipe.ema_decay:g})"
        )
    return "\n".join(lines)
