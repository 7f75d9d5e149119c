"""Speed and memory of RubiksNet, in inference and in training, compared with TSM and MViTv2-S.

    python benchmarks/network.py [--models rubiks-large tsm] [--modes eager compiled] [--batches 1 32]
                                 [--precisions bf16 tf32] [--phases inference training] [--json FILE]

Models: rubiks-TIER, rubiks-TIER-aq, and rubiks-TIER-hard, whose attention has become whole-frame shifts of an eighth of
the channels; tsm and tsm-mobilenetv2, torchvision's ResNet-50 and MobileNetV2 with the temporal shift of TSM (Lin et
al., ICCV 2019) before the first convolution of every block (MobileNetV2: of those with a residual); mvit, torchvision's
MViTv2-S on twice the frames. All have random weights and 174 classes. Modes, for the models in parentheses:

    eager             as built (rubiks, tsm, mvit)
    channels-last     weights and images in channels-last order (tsm)
    compiled          torch.compile, for tsm on top of channels-last (rubiks, tsm, mvit)
    compiled-graphs   the same with mode="reduce-overhead", that is CUDA graphs; only where --modes asks for it
    folded            compiled-graphs with batch norm folded into the convolutions (tsm, inference only)
    optimized         RubiksNet.optimize_for_inference (rubiks, inference only)

bf16 is autocast from float32 weights, but optimized and folded networks hold bfloat16 weights and take bfloat16 clips,
cast within the timed call; tf32 is float32 with TF32 matrix products and convolutions. A training step is forward,
cross entropy, backward and a step of fused SGD with momentum. Times are medians over --repeats calls after --warmup
calls; on a GPU they are intervals between events recorded after successive calls, so that launches overlap the work
before as they do in use. Memory, weights included: the peak of what PyTorch allocated from the third call on, in which
RubiksNet's training step is recorded as CUDA graphs, and what it had reserved at the end, including graphs and its
cache. The last columns divide the clips per second by those of the fastest mode of tsm, and of tsm-mobilenetv2, at the
same batch and precision in this run. GFLOPs are those of convolutions and matrix products, two per multiply-add; shifts
are not counted. Failures, such as running out of memory, are reported, and the rest continues. The JSON file is
rewritten after every measurement.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck

from rubiks import RubiksNet
from rubiks.models import TIERS
from rubiks.ops import library, operator

CLASSES = 174
PHASES = ("inference", "training")
PRECISIONS = ("bf16", "tf32", "float32")
FAMILY_MODES = {
    "rubiks": ("eager", "compiled", "compiled-graphs", "optimized"),
    "tsm": ("eager", "channels-last", "compiled", "compiled-graphs", "folded"),
    "mvit": ("eager", "compiled", "compiled-graphs"),
}
MODES = ("eager", "channels-last", "compiled", "compiled-graphs", "folded", "optimized")
INFERENCE_MODES = ("folded", "optimized")
# The default of --modes. Compiling makes RubiksNet slower; on a CPU everything takes seconds.
DEFAULT_MODES: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {"rubiks": ("eager", "optimized"), "tsm": ("channels-last", "compiled", "folded"), "mvit": ("eager",)},
    "cpu": {"rubiks": ("eager", "optimized"), "tsm": ("channels-last",), "mvit": ("eager",)},
}
PUBLISHED = ("rubiks3d", "rubiks3d-aq")
RUBIKS = {f"rubiks-{tier}{variant[len('rubiks3d') :]}": (tier, variant) for tier in TIERS for variant in PUBLISHED}
RUBIKS |= {f"rubiks-{tier}-hard": (tier, "rubiks3d-aq") for tier in TIERS}
PEERS = {"over_tsm": "tsm", "over_mobilenet": "tsm-mobilenetv2"}  # what others are compared with
MODELS = (*PEERS.values(), *RUBIKS, "mvit")
BUDGET = 0.125  # share of channels that a hard network moves


class TemporalShift(nn.Module):
    """Move an eighth of the channels one frame back and an eighth one frame ahead; zeros enter at a clip's ends.

    Frames stay four-dimensional throughout, so that channels-last order survives without a conversion.
    """

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        """(N*T, C, H, W) -> the same shape."""
        part = x.shape[1] // 8
        back, ahead, stay = x.split([part, part, x.shape[1] - 2 * part], dim=1)
        frame = (torch.arange(len(x), device=x.device) % self.frames).view(-1, 1, 1, 1)
        back = F.pad(back, (0, 0, 0, 0, 0, 0, -1, 1)) * (frame < self.frames - 1)
        ahead = F.pad(ahead, (0, 0, 0, 0, 0, 0, 1, -1)) * (frame > 0)
        return torch.cat((back, ahead, stay), dim=1)


class TSM(nn.Module):
    """A network on every frame with residual temporal shifts; the logits are averaged over the frames."""

    def __init__(self, net: nn.Module, frames: int) -> None:
        super().__init__()
        self.net = net
        for block in net.modules():
            if isinstance(block, Bottleneck):
                block.conv1 = nn.Sequential(TemporalShift(frames), block.conv1)
            elif isinstance(block, InvertedResidual) and block.use_res_connect:
                block.conv = nn.Sequential(TemporalShift(frames), *block.conv)

    def forward(self, clips: Tensor) -> Tensor:
        """(N, T, 3, H, W) -> (N, classes)."""
        return self.net(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)


class MViT(nn.Module):
    """MViTv2-S, for clips with the time axis before the channels; its position tables are for one clip size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.video.mvit_v2_s(weights=None, num_classes=CLASSES)

    def forward(self, clips: Tensor) -> Tensor:
        """(N, 16, 3, 224, 224) -> (N, classes)."""
        if clips.shape[1:] != (16, 3, 224, 224):
            raise ValueError("torchvision's MViTv2-S takes 16 frames of 224 x 224 (--frames 8 --size 224)")
        return self.net(clips.transpose(1, 2))


def fold_norms(net: nn.Module) -> nn.Module:
    """Make batch norms part of the convolutions before them: of children, the one before, or its last part."""
    for module in net.modules():
        for (name, child), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            convolution = child[-1] if isinstance(child, nn.Sequential) else child
            assert isinstance(convolution, nn.Conv2d)
            folded = fuse_conv_bn_eval(convolution, norm)
            if isinstance(child, nn.Sequential):
                child[-1] = folded
            else:
                setattr(module, name, folded)
            setattr(module, norm_name, nn.Identity())
    return net


def family(model: str) -> str:
    return model.partition("-")[0]


def clip_frames(model: str, frames: int) -> int:
    return 2 * frames if model == "mvit" else frames


def build(model: str, frames: int) -> nn.Module:
    if model in PEERS.values():
        make = torchvision.models.mobilenet_v2 if model == "tsm-mobilenetv2" else torchvision.models.resnet50
        return TSM(make(weights=None, num_classes=CLASSES), clip_frames(model, frames))
    if model == "mvit":
        return MViT()
    tier, variant = RUBIKS[model]
    return RubiksNet(tier, CLASSES, variant, clip_frames(model, frames))


def in_mode(net: nn.Module, mode: str, dtype: torch.dtype) -> nn.Module:
    """The network as the mode runs it; `dtype` is that of its weights in inference modes."""
    if isinstance(net, TSM) and mode != "eager":
        net = net.to(memory_format=torch.channels_last)
    if mode == "folded":
        net = fold_norms(net).to(dtype)
    if mode.startswith("compiled") or mode == "folded":
        torch._dynamo.reset()
        net.compile(dynamic=False, mode="default" if mode == "compiled" else "reduce-overhead")
    return net.optimize_for_inference(dtype) if mode == "optimized" else net  # type: ignore[operator]


def step(
    model: str, mode: str, phase: str, precision: str, batch: int, frames: int, size: int, device: str
) -> tuple[nn.Module, Callable[[], Any]]:
    """A fresh network on the device and the call to time."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    dtype = torch.bfloat16 if mode in INFERENCE_MODES and precision == "bf16" else torch.float32
    net = build(model, frames)
    if model.endswith("-hard"):
        net.harden(BUDGET)  # type: ignore[operator]
    net = in_mode(net.to(device).train(phase == "training"), mode, dtype)
    clips = torch.randn(batch, clip_frames(model, frames), size, size, 3, device=device).movedim(-1, 2)
    if not (family(model) == "tsm" and mode != "eager"):
        clips = clips.contiguous()
    labels = torch.randint(CLASSES, (batch,), device=device)

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def infer() -> None:
        with torch.inference_mode(), autocast():
            net(clips.to(dtype))

    if phase == "inference":
        return net, infer
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9, fused=True)

    def train() -> None:
        with autocast():
            loss = F.cross_entropy(net(clips), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return net, train


def timed(run: Callable[[], Any], warmup: int, repeats: int, device: str) -> tuple[float, dict[str, float]]:
    """Median milliseconds of a call and, on a GPU, the memory in GiB."""
    if device == "cpu":
        for _ in range(warmup):
            run()
        marks = [time.perf_counter()]
        for _ in range(repeats):
            run()
            marks.append(time.perf_counter())
        return 1e3 * statistics.median(end - start for start, end in itertools.pairwise(marks)), {}
    for call in range(max(warmup, 3)):
        if call in (0, 2):
            torch.cuda.reset_peak_memory_stats()
        run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # of what only the first calls needed
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    duration = statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(events))
    memory = {"peak_gib": torch.cuda.max_memory_allocated(), "held_gib": torch.cuda.memory_reserved()}
    return duration, {name: size / 2**30 for name, size in memory.items()}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def numbers(key: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    _, run = step(**key, frames=arguments.frames, size=arguments.size, device=arguments.device)
    gc.collect()
    gc.freeze()  # as train.py does, so that what a compiler leaves in this process does not slow later models
    duration, memory = timed(run, arguments.warmup, arguments.repeats, arguments.device)
    return {"ms": duration, "clips_per_second": 1e3 * key["batch"] / duration, **memory}


def measure(key: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of one model, mode, phase, precision and batch, with its numbers or its error."""
    try:
        row = key | numbers(key, arguments)
    except Exception as error:  # any failure is a result
        row = key | {"error": first_line(error)}
    gc.unfreeze()
    gc.collect()  # compiled networks are in reference cycles
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return row


def describe(model: str, frames: int, size: int) -> dict[str, Any]:
    """Parameters and arithmetic of a model, counted without running it."""
    length = clip_frames(model, frames)
    with torch.device("meta"):
        net = build(model, frames).eval()
        clip = torch.empty(1, length, 3, size, size)
    row: dict[str, Any] = {
        "model": model,
        "frames": length,
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(clip)
    except Exception as error:  # an input that the model rejects also fails in each measurement
        return row | {"error": first_line(error)}
    return row | {"gflops_per_clip": counter.get_total_flops() / 1e9}


def keys(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What to measure, in order: at every batch and precision first the peers, with which others are compared."""
    found = []
    for precision, batch, model in itertools.product(arguments.precisions, arguments.batches, arguments.models):
        wanted = arguments.modes or DEFAULT_MODES[arguments.device][family(model)]
        for mode, phase in itertools.product(FAMILY_MODES[family(model)], arguments.phases):
            if mode in wanted and (mode not in INFERENCE_MODES or phase == "inference"):
                found.append({"model": model, "mode": mode, "phase": phase, "precision": precision, "batch": batch})
    return found


def best(peer: str, rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """Clips per second of a peer's fastest mode so far, in the row's setting."""
    same = ("phase", "precision", "batch")
    rates = [
        other["clips_per_second"]
        for other in rows
        if other["model"] == peer and "error" not in other and all(other[k] == row[k] for k in same)
    ]
    return max(rates, default=None)


def text(row: dict[str, Any]) -> str:
    head = f"{row['precision']:<8}{row['batch']:>5}  {row['model']:<18}{row['mode']:<16}{row['phase']:<10}"
    if "error" in row:
        return f"{head}  failed: {row['error']}"
    memory = "".join(f"{row[name]:>10.2f}" if name in row else f"{'':>10}" for name in ("peak_gib", "held_gib"))
    shares = "".join(f"{row[key]:>8.2f}" if key in row else f"{'':>8}" for key in PEERS).rstrip()
    return f"{head}{row['clips_per_second']:>9.1f}{row['ms']:>10.2f}{memory}{shares}"


def machine(device: str) -> dict[str, Any]:
    operator.prepare()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "python": platform.python_version(),
        "shift": "compiled" if library.load().compiled(device.upper()) else "reference",
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default all but compiled-graphs, on a CPU fewer")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default bf16 tf32; on a CPU float32")
    parser.add_argument("--batches", type=int, nargs="+", help="default 1 8 32 64; on a CPU 1")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--warmup", type=int, help="calls before the timed ones; default 5 and at least 3, on a CPU 2")
    parser.add_argument("--repeats", type=int, help="timed calls; default 20, on a CPU 5")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args(words)
    cuda = arguments.device == "cuda"
    arguments.models = [model for model in MODELS if model in (arguments.models or MODELS)]
    arguments.precisions = arguments.precisions or (["bf16", "tf32"] if cuda else ["float32"])
    arguments.batches = arguments.batches or ([1, 8, 32, 64] if cuda else [1])
    arguments.warmup = (5 if cuda else 2) if arguments.warmup is None else arguments.warmup
    arguments.repeats = arguments.repeats or (20 if cuda else 5)
    return arguments


def ratios(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> dict[str, float]:
    if "error" in row:
        return {}
    rates = {key: best(peer, rows, row) for key, peer in PEERS.items()}
    return {key: row["clips_per_second"] / rate for key, rate in rates.items() if rate is not None}


def print_models(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'model':<18}{'frames':>7}{'parameters':>12}{'GFLOPs/clip':>13}")
    for row in rows:
        flops = f"  failed: {row['error']}" if "error" in row else f"{row['gflops_per_clip']:>13.1f}"
        print(f"{row['model']:<18}{row['frames']:>7}{row['parameters'] / 1e6:>10.2f} M{flops}")


def main() -> None:
    arguments = parse()
    torch.backends.cudnn.benchmark = True
    command = [word for word in sys.argv[1:] if word not in ("--json", str(arguments.json))]
    settings = {key: value for key, value in vars(arguments).items() if key not in ("models", "json", "device")}
    report = {"command": " ".join(["python benchmarks/network.py", *command]), **machine(arguments.device), **settings}
    print(f"{report['device']}, PyTorch {report['torch']}, {report['threads']} threads, {report['shift']} shift")
    print(f"{arguments.frames} x {arguments.size} x {arguments.size}; medians of {arguments.repeats} calls\n")
    report["models"] = [describe(model, arguments.frames, arguments.size) for model in arguments.models]
    print_models(report["models"])
    columns = f"{'phase':<10}{'clips/s':>9}{'ms':>10}{'peak GiB':>10}{'held GiB':>10}{'/ TSM':>8}{'/ MBv2':>8}"
    print(f"\n{'':<8}{'batch':>5}  {'model':<18}{'mode':<16}{columns}")
    report["rows"] = rows = []
    for key in keys(arguments):
        row = measure(key, arguments)
        rows.append(row)
        for each in rows:
            each.update(ratios(rows, each))  # the peers' own modes too, once all have been measured
        print(text(row), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
