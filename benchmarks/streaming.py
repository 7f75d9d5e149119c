"""Speed and memory of causal networks frame by frame, and how soon they know the class.

    python benchmarks/streaming.py [--tiers tiny large] [--variant rubiks3d] [--repeats 50] [--json FILE]
                                   [ckpt=outputs/causal data=builtin ...]

Networks with random weights take frames of one video, from uint8 pixels to the class. Times are medians over --repeats
frames: on the clock, and of all processor cores together, which other work on the machine hardly changes. Offsets in
time are those of a new network, so a trained one may keep more frames. The state
is what `RubiksNet.stream` keeps of one video, in float32.

With choices as for eval.py, the causal network of a checkpoint also classifies the validation videos frame by frame:
the share of videos whose class it gives right after each frame of the protocol's first clip and central crop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rubiks import RubiksNet, assemble, weights
from rubiks.choices import CommandLine
from rubiks.cli.entry import compose, plain
from rubiks.data import videos
from rubiks.errors import InputError, VideoError
from rubiks.experiment import Evaluation
from rubiks.models import TIERS, VARIANTS
from rubiks.models.checkpoint import SavedNetwork
from rubiks.nn import Normalize
from rubiks.ops import library, operator

CLASSES = 174


def processor() -> str:
    """The processor's name, if Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def speed(tier: str, variant: str, size: int, repeats: int, device: str) -> dict[str, Any]:
    """Milliseconds per frame, on the clock and of processor time, and bytes of the state."""
    torch.manual_seed(0)
    stream = RubiksNet(tier, CLASSES, variant, causal=True).to(device).stream()
    normalize = Normalize().to(device)
    frames = torch.randint(0, 256, (16, 1, 3, size, size), dtype=torch.uint8)
    state, times = None, []
    for index in range(repeats + 5):
        start, busy = time.perf_counter(), time.process_time()
        logits, state = stream.step(normalize(frames[index % len(frames)].to(device)), state)
        int(logits.argmax())
        times.append((time.perf_counter() - start, time.process_time() - busy))
    clock, processor = (1e3 * statistics.median(each) for each in zip(*times[5:], strict=True))
    state_bytes = stream.state_bytes(size, size)
    return {"tier": tier, "variant": variant, "ms": clock, "processor_ms": processor, "state_bytes": state_bytes}


@torch.inference_mode()
def accuracy(choices: Sequence[str], device: str) -> dict[str, Any]:
    """Percentages of the validation videos that are right after each frame."""
    settings = Evaluation(**plain(compose([*choices], "eval")))
    saved = weights.evaluated(settings, CommandLine([*choices]))
    if not isinstance(saved, SavedNetwork):
        raise InputError(f"{saved.path} is an exported file, which has no stream; give a checkpoint")
    protocol = settings.protocol_for(settings.data.sampling.resolve(dataclasses.asdict(saved.preprocessing)))
    manifest, source = videos.manifest_of(settings.data.source), settings.data.source.ready()
    classes = videos.class_names(source, saved.classes, saved.num_classes)
    weights.check_same_classes(saved, classes)
    listed, _ = videos.records(source, settings.data.loading, "val", len(classes), manifest)
    dataset = assemble.evaluation_data(settings, listed, protocol).dataset("val")

    stream, normalize = RubiksNet.from_saved(saved).to(device).stream(), Normalize().to(device)
    right = torch.zeros(protocol.num_frames, dtype=torch.int64)
    for index, video in enumerate(listed):
        item = dataset[0, index, 0]
        if isinstance(item, VideoError):
            raise InputError(str(item))
        clip: Tensor = normalize(item["views"][protocol.central_view].to(device))
        state = None
        for t, frame in enumerate(clip):
            logits, state = stream.step(frame[None], state)
            right[t] += int(logits.argmax()) == video.label
    top1 = [100 * count / len(listed) for count in right.tolist()]
    return {"data": source.name, "videos": len(listed), "tier": saved.tier, "variant": saved.variant, "top1": top1}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choices", nargs="*", metavar="KEY=VALUE", help="as for eval.py: ckpt=..., data=...")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--variant", choices=VARIANTS, default="rubiks3d")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=50, help="frames that are timed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the tables, write the file."""
    operator.prepare()
    device, size = arguments.device, arguments.size
    report: dict[str, Any] = {
        "command": f"python benchmarks/streaming.py {' '.join(sys.argv[1:])}",
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shift": "compiled" if library.load().compiled(device.upper()) else "reference",
        "size": size,
        "rows": [],
    }
    print(f"{report['device']}, {report['threads']} threads, PyTorch {torch.__version__}, frames of {size} x {size}")
    print(f"{'tier':<8}{'ms/frame':>10}{'processor ms':>14}{'state, MB':>11}")
    for tier in arguments.tiers:
        row = speed(tier, arguments.variant, size, arguments.repeats, device)
        report["rows"].append(row)
        times = f"{row['ms']:>10.1f}{row['processor_ms']:>14.1f}"
        print(f"{tier:<8}{times}{row['state_bytes'] / 1e6:>11.1f}", flush=True)
    if arguments.choices:
        report["accuracy"] = accuracy(arguments.choices, device)
        for t, share in enumerate(report["accuracy"]["top1"], start=1):
            print(f"after {t} of {len(report['accuracy']['top1'])} frames: top-1 {share:.1f}%")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    run(parse())
