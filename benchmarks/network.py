"""Clips per second of RubiksNet, in inference and in training, and the share of time that the shift takes.

    python benchmarks/network.py [--tiers tiny large] [--size 224] [--batch 32] [--json FILE]

Times are medians over repetitions on the GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rubiks import RubiksNet
from rubiks.models import TIERS, VARIANTS
from rubiks.nn import LearnableShift


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, the device's work included."""
    times = []
    for _ in range(repeats + 2):  # the first two warm up
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def shift_seconds(net: RubiksNet, clips: torch.Tensor, training: bool, repeats: int) -> float:
    """Time of all the network's shifts alone, on inputs of the shapes that they meet."""
    calls: list[tuple[LearnableShift, torch.Tensor]] = []
    modules = [module for module in net.modules() if isinstance(module, LearnableShift)]
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append((m, args[0].detach()))) for m in modules]
    with torch.no_grad():
        net(clips)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for module, x in calls:
            with torch.set_grad_enabled(training):
                out = module(x.requires_grad_(training))
            if training:
                out.backward(out.detach())

    return seconds(run, repeats)


def measure(tier: str, variant: str, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    net = RubiksNet(tier, 174, variant).to(device)
    clips = torch.randn(arguments.batch, arguments.frames, 3, arguments.size, arguments.size, device=device)
    labels = torch.randint(174, (arguments.batch,), device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            net(clips)

    def train() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = F.cross_entropy(net(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    row: dict[str, Any] = {"tier": tier, "variant": variant}
    for name, mode, run in (("inference", False, infer), ("training", True, train)):
        net.train(mode)
        duration = seconds(run, arguments.repeats)
        row[f"{name}_clips_per_second"] = arguments.batch / duration
        row[f"{name}_shift_share"] = shift_seconds(net, clips, mode, arguments.repeats) / duration
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=["tiny"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    )
    print(f"{name}, PyTorch {torch.__version__}, batch {arguments.batch}, {arguments.frames} x {arguments.size} pixels")
    print(f"{'tier':<8}{'variant':<14}{'inference/s':>12}{'of it shift':>12}{'training/s':>12}{'of it shift':>12}")
    rows = []
    for tier in arguments.tiers:
        for variant in arguments.variants:
            row = measure(tier, variant, arguments, device)
            rows.append(row)
            print(
                f"{tier:<8}{variant:<14}{row['inference_clips_per_second']:>12.1f}{row['inference_shift_share']:>12.0%}"
                f"{row['training_clips_per_second']:>12.1f}{row['training_shift_share']:>12.0%}"
            )
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        content = {"device": name, "torch": torch.__version__, "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
