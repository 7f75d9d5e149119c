"""How each variant of RubiksNet uses time: trained on the built-in data set, whose classes are pairs of an action and
the same played backwards.

    python benchmarks/temporal_probe.py [--tiers tiny small] [--variants rubiks3d ...] [--seeds 0 1 2] [--json FILE]

Every network is trained from random weights for the same number of steps on the same clips, which are drawn once and
stay on the device. One centre crop of each validation clip is scored. Columns, means and standard deviations over the
seeds:

    top-1       of the unchanged clips
    shuffled    top-1 with the frames in random order
    reversed    top-1, against the original label, with the frames in reverse: a network that uses time then answers
                with the other class of the pair
    pair        how often the logit of the right class is above that of the other of its pair; without time 50%
    budget      with temporal attention, the share of channels whose attention is largest on another frame

GFLOPs are of one clip, those of convolutions and matrix products, two per multiply-add; shifts are not counted. The
recipe: AdamW at 2e-3 for a batch of 16, weight decay 0.05, cosine after 10% of warm-up, shifts at the same rate with
gradients normalised per channel; random frames of each segment, random crop, brightness and colour. On a GPU bfloat16,
as in training by default. The JSON file is rewritten after every network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as tv

from rubiks import RubiksNet
from rubiks.data import scenes
from rubiks.data.builtin import DEFAULT_VIDEOS
from rubiks.data.builtin_clips import Clip, Plan
from rubiks.data.datamodule import default_workers
from rubiks.evaluation.protocols import segment_centres
from rubiks.models import TIERS, VARIANTS
from rubiks.nn import Normalize, RubiksBlock
from rubiks.training import optim
from rubiks.training.aq import Annealing, AttentionSchedule
from rubiks.training.recipe import Recipe

TRAINING_CLIPS = {"plain": 1024, "textured": 4096}
KEPT = 3  # frames of a training clip's segment to choose from
SCORES = ("top1", "shuffled", "reversed", "pair")


class Clips(NamedTuple):
    """Decoded clips and their labels (N,) on the device; frames uint8 (N, K, 3, S, S)."""

    frames: Tensor
    labels: Tensor


class Drawn(Dataset):
    """Clips of a plan: the frames at the centres of `kept` equal segments, their central squares in `side` pixels."""

    def __init__(self, plan: Plan, clips: Sequence[Clip], kept: int, side: int) -> None:
        self.plan = plan
        self.clips = clips
        self.kept = kept
        self.side = side

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        clip = self.clips[index]
        frames = scenes.draw(self.plan.rng(clip), self.plan.level, clip.label)
        chosen = torch.from_numpy(frames[segment_centres(len(frames), self.kept)]).permute(0, 3, 1, 2)
        resized = tv.resize(chosen, [self.side], antialias=True)
        return tv.center_crop(resized, [self.side, self.side]), clip.label


def draw(plan: Plan, split: int, kept: int, side: int, workers: int, device: str) -> Clips:
    data = Drawn(plan, [clip for clip in plan.clips() if clip.split == split], kept, side)
    # Copied at once, so that little shared memory is needed.
    copies = [[part.to(device, copy=True) for part in batch] for batch in DataLoader(data, 8, num_workers=workers)]
    frames, labels = zip(*copies, strict=True)
    return Clips(torch.cat(frames), torch.cat(labels))


def training_views(clips: Clips, indices: Tensor, frames: int, size: int) -> Tensor:
    """One kept frame of each segment, a crop that a clip's frames share -> uint8 (B, T, 3, size, size)."""
    device, batch, side = indices.device, len(indices), clips.frames.shape[-1]
    kept = torch.randint(KEPT, (batch, frames), device=device) + KEPT * torch.arange(frames, device=device)
    top, left = torch.randint(side - size + 1, (2, batch, 1), device=device)
    rows, columns = (first + torch.arange(size, device=device) for first in (top, left))
    return clips.frames[
        indices[:, None, None, None, None],
        kept[:, :, None, None, None],
        torch.arange(3, device=device)[:, None, None],
        rows[:, None, None, :, None],
        columns[:, None, None, None, :],
    ]


def recoloured(x: Tensor) -> Tensor:
    """Normalised views (B, T, 3, H, W) with a random contrast per clip and a random brightness per colour."""
    contrast = torch.empty(len(x), 1, 1, 1, 1, device=x.device).uniform_(0.8, 1.2)
    brightness = torch.empty(len(x), 1, 3, 1, 1, device=x.device).uniform_(-0.2, 0.2)
    return x * contrast + brightness


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(net: RubiksNet, clips: Clips, recipe: Recipe, attention: AttentionSchedule, steps: int, size: int) -> float:
    """Train for a number of steps, one epoch of the recipe; returns steps per second, without the first few."""
    device = clips.labels.device
    net.train()
    normalize = Normalize().to(device)
    optimizer = optim.optimizer(optim.parameter_groups(net, recipe, recipe.scaled_lr(1)), recipe)
    shifts = optim.shift_parameters(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.lr_factor(recipe, steps))
    annealing = Annealing(net, attention).to(device) if net.attention_shifts() else None
    total, count = steps * recipe.batch_size, len(clips.labels)
    order = torch.cat([torch.randperm(count, device=device) for _ in range(math.ceil(total / count))])
    warm, start = min(10, steps // 2), 0.0
    for step, indices in enumerate(order[:total].view(steps, -1)):
        if step == warm:
            start = clock(device)
        if annealing is not None:
            annealing.begin_step(step, steps)
        views = recoloured(normalize(training_views(clips, indices, net.num_frames, size)))
        with autocast(device):
            logits = net(views)
        loss = F.cross_entropy(logits.float(), clips.labels[indices])
        if annealing is not None:
            loss = loss + annealing.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optim.normalize_shifts(shifts)
        if annealing is not None:
            annealing.end_step(steps)
        optimizer.step()
        schedule.step()
    return (steps - warm) / (clock(device) - start)


def clock(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def logits_of(net: RubiksNet, frames: Tensor, size: int) -> Tensor:
    """Of the centre crops of uint8 (N, T, 3, S, S) -> float32 (N, classes)."""
    net.eval()
    normalize = Normalize().to(frames.device)
    with autocast(frames.device):
        return torch.cat([net(normalize(tv.center_crop(part, [size, size]))).float() for part in frames.split(64)])


def score(net: RubiksNet, clips: Clips, size: int) -> dict[str, float]:
    """Percentages, by the names of `SCORES`."""
    frames, labels = clips
    order = torch.rand(frames.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1).to(labels.device)
    shuffled = frames[torch.arange(len(frames), device=labels.device)[:, None], order]
    logits = logits_of(net, frames, size)

    def percent(right: Tensor) -> float:
        return 100 * right.double().mean().item()

    def top1(logits: Tensor) -> float:
        return percent(logits.argmax(1) == labels)

    own, other = (logits.gather(1, label[:, None]) for label in (labels, labels ^ 1))  # pairs are 0 1, 2 3, ...
    return {
        "top1": top1(logits),
        "shuffled": top1(logits_of(net, shuffled, size)),
        "reversed": top1(logits_of(net, frames.flip(1), size)),
        "pair": percent(own > other),
    }


def budget(net: RubiksNet) -> float | None:
    """Share of the channels whose temporal attention is largest on another frame; None without attention."""
    shifts = [module.attention for module in net.modules() if isinstance(module, RubiksBlock)]
    weights = [shift.attention().detach() for shift in shifts if shift is not None]
    return (torch.cat(weights).argmax(1) != 1).double().mean().item() if weights else None


def describe(tier: str, variant: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Parameters and arithmetic, counted without running the network."""
    frames, size = arguments.frames, arguments.size
    with torch.device("meta"):
        net = RubiksNet(tier, len(scenes.class_names(arguments.level)), variant, frames).eval()
        clip = torch.empty(1, frames, 3, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(clip)
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "gflops": counter.get_total_flops() / 1e9,
    }


def probe(tier: str, variant: str, seed: int, data: tuple[Clips, Clips], arguments: argparse.Namespace) -> dict:
    """What training one network gave."""
    training, validation = data
    recipe = Recipe(
        epochs=1,
        batch_size=arguments.batch,
        lr=2e-3,
        lr_batch=16,
        optimizer="adamw",
        weight_decay=0.05,
        shift_lr_scale=1.0,
        schedule="cosine",
        warmup_epochs=0.1,
    )
    torch.manual_seed(seed)
    net = RubiksNet(tier, len(scenes.class_names(arguments.level)), variant, arguments.frames).to(arguments.device)
    rate = train(net, training, recipe, AttentionSchedule(budget=arguments.budget), arguments.steps, arguments.size)
    return {
        "tier": tier,
        "variant": variant,
        "seed": seed,
        **score(net, validation, arguments.size),
        "budget": budget(net),
        "steps_per_second": rate,
    }


HEAD = (
    f"{'tier':<8}{'variant':<20}{'top-1':>14}{'shuffled':>14}{'reversed':>14}{'pair':>14}"
    f"{'parameters':>12}{'GFLOPs':>8}{'budget':>8}{'steps/s':>9}"
)


def line(rows: Sequence[dict]) -> str:
    """Of the table, from the rows of all seeds of a tier and a variant."""
    scores = [[row[name] for row in rows] for name in SCORES]
    text = "".join(
        f"{statistics.mean(s):>7.1f} {f'±{statistics.stdev(s):.1f}' if len(s) > 1 else '':<6}" for s in scores
    )
    first = rows[0]
    shares = [row["budget"] for row in rows if row["budget"] is not None]
    share = f"{100 * statistics.mean(shares):>7.1f}%" if shares else f"{'':>8}"
    rate = statistics.mean(row["steps_per_second"] for row in rows)
    size = f"{first['parameters'] / 1e6:>10.2f} M{first['gflops']:>8.2f}"
    return f"{first['tier']:<8}{first['variant']:<20}{text}{size}{share}{rate:>9.1f}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=["tiny"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=750, help="optimiser steps of each network")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the views, in pixels")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--budget", type=float, default=0.125, help="of rubiks3d-aq")
    parser.add_argument("--level", choices=scenes.LEVELS, default="plain")
    parser.add_argument("--clips", type=int, nargs=2, metavar=("TRAINING", "VALIDATION"), help="default by level")
    parser.add_argument("--workers", type=int, default=default_workers(1), help="processes that draw the clips")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args(words)
    arguments.clips = arguments.clips or [TRAINING_CLIPS[arguments.level], DEFAULT_VIDEOS[arguments.level][1]]
    return arguments


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table, write the file; the row of every network."""
    start = time.perf_counter()
    plan, side = Plan(arguments.level, 0, *arguments.clips), round(arguments.size * 256 / 224)
    training, validation = (
        draw(plan, split, kept, side, arguments.workers, arguments.device)
        for split, kept in enumerate((KEPT * arguments.frames, arguments.frames))
    )
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    print(f"{name}, PyTorch {torch.__version__}; {arguments.steps} steps of {arguments.batch} clips", end=" ")
    print(f"of {arguments.frames} x {arguments.size} x {arguments.size}, seeds {', '.join(map(str, arguments.seeds))}")
    print(f"{' + '.join(map(str, arguments.clips))} clips of level {arguments.level}", end=" ")
    print(f"drawn in {time.perf_counter() - start:.0f} s\n\n{HEAD}", flush=True)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "workers")}
    report: dict[str, Any] = {**settings, "device": name, "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    for tier, variant in itertools.product(arguments.tiers, arguments.variants):
        facts = describe(tier, variant, arguments)
        for seed in arguments.seeds:
            rows.append(probe(tier, variant, seed, (training, validation), arguments) | facts)
            if arguments.json:
                arguments.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
        print(line(rows[-len(arguments.seeds) :]), flush=True)
    return rows


def main() -> None:
    torch.backends.cudnn.benchmark = True
    run(parse())


if __name__ == "__main__":
    main()
