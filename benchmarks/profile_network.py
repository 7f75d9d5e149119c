"""Where the time of one inference or training step of RubiksNet goes: kernels, parts of the network, memory traffic.

    python benchmarks/profile_network.py [--tier large] [--variant rubiks3d] [--phase training] [--batch 32]
                                         [--precision bf16] [--mode eager] [--json FILE]

Kernels (on a CPU: operators) of one step are listed by their share of all kernels' time. A table gives the same time by
stage and part of the block (of fused blocks, by stage alone): a backward kernel counts for the part whose forward it
belongs to. Kernels of a replayed CUDA graph, which no operator launches, are unlinked, so a training step is traced
without its graphs. Kernels that start while the one before them ends overlap, so the sum of their times may exceed the
step's. Last come the bytes of the least number of passes over the activations, against the step's time, measured
without the profiler, and the bandwidth of a large copy, measured in the same run. The passes assumed for a block, each
tensor in the step's precision and each pass reading and writing it once, with batch norm and ReLU applied on the way:

    forward    read x, write h = conv2(x);  read h, write z = shift(h);  read z and the shortcut, write out. A shortcut
               with a convolution reads x at the pixels that it keeps.
    backward   read d_out and z, write d_z;  read d_z and h, write d_a (before batch norm's gradient, whose sums the
               pass takes);  read d_a, h and x, write d_b (likewise);  read d_b, x and the shortcut's gradient, write
               d_x.

The stem reads the clip in float32 and writes once (the backward reads the clip and its output's gradient); the head
reads the last features once (the backward reads them and writes their gradient). Weights, optimizer, squeeze-excite and
attention are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from network import FAMILY_MODES, PHASES, PRECISIONS, machine, step, timed
from shift import called, copy_bandwidth
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rubiks.models import TIERS, training_path
from rubiks.models.training_support import supports
from rubiks.nn import AttentionShift, RubiksBlock

MARK = "part/"  # prefix of our own profiler annotations
PARTS = {"bn1": "bn", "conv2": "conv2", "bn2": "bn", "as3": "shift", "se": "se", "conv3": "conv3", "shortcut": "conv3"}
REST = "relu, add"  # what a block does outside its modules
COLUMNS = ("attention", "conv2", "shift", "se", "conv3", "bn", REST, "")
SECTIONS = ("stem", *(f"stage {i}" for i in range(5)), "head", "optimizer", "other", "unlinked")


def annotate(module: nn.Module, section: str, part: str) -> None:
    """Mark the module's forward with its own profiler annotation."""
    opened: list[record_function] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        opened.append(record_function(f"{MARK}{section}/{part}"))
        opened[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def annotate_network(net: nn.Module) -> None:
    """Mark stem, stages, the parts of their blocks, and head, if the network has them under these names."""
    for name, module in net.named_modules():
        last = name.rpartition(".")[2]
        stage = re.search(r"layer(\d)\.", name)
        if stage and isinstance(module, RubiksBlock):
            annotate(module, f"stage {stage[1]}", REST)
            for child, inner in module.named_children():
                for each in (inner, *inner.children()) if isinstance(inner, nn.Sequential) else (inner,):
                    part = "attention" if isinstance(each, AttentionShift) else PARTS.get(child, REST)
                    annotate(each, f"stage {stage[1]}", part)
        elif last in ("conv1", "bn_last", "new_fc") and not stage:
            annotate(module, "stem" if last == "conv1" else "head", "")


def annotate_fused_blocks() -> None:
    """Mark the stages of the fused blocks; hooks on the modules would turn these off."""
    stages = itertools.cycle(range(5))
    original = training_path.train_blocks

    def annotated(*arguments: Any) -> Any:
        with record_function(f"{MARK}stage {next(stages)}/"):
            return original(*arguments)

    training_path.train_blocks = annotated  # type: ignore[assignment]


def least_bytes(net: nn.Module, run: Callable[[], Any], training: bool, itemsize: int) -> dict[str, int]:
    """Bytes by section that one step moves with the passes listed in the module's docstring."""
    moved: dict[str, int] = defaultdict(int)

    def block(section: str) -> Callable[..., None]:
        def count(module: RubiksBlock, inputs: tuple[Tensor, int], output: Tensor) -> None:
            x, out = inputs[0].numel(), output.numel()
            h = x // module.bn1.num_features * module.bn2.num_features
            z = out
            kept = x if module.shortcut is None else out // module.bn2.num_features * module.bn1.num_features
            total = (x + h) + (h + z) + (z + kept + out)
            if training:
                total += (out + z + z) + (z + h + h) + (h + h + x + x) + (x + x + kept + x)
            moved[section] += total * itemsize

        return count

    def stem(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        moved["stem"] += (2 if training else 1) * (4 * inputs[0].numel() + itemsize * output.numel())

    def head(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        moved["head"] += (3 if training else 1) * itemsize * inputs[0].numel()

    handles = []
    for name, module in net.named_modules():
        stage = re.search(r"layer(\d)\.", name)
        if stage and isinstance(module, RubiksBlock):
            handles.append(module.register_forward_hook(block(f"stage {stage[1]}")))
        elif name == "backbone.conv1":
            handles.append(module.register_forward_hook(stem))
        elif name == "backbone.bn_last":
            handles.append(module.register_forward_hook(head))
    run()
    for handle in handles:
        handle.remove()
    return dict(moved)


def traced(run: Callable[[], Any], device: str) -> profile:
    """The profile of one call, after an unprofiled one."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    run()
    with profile(activities=activities, acc_events=True) as trace:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return trace


def short(name: str) -> str:
    """A kernel's name without namespaces; of ours also without parameters, as in the table of ext/README.md."""
    ours = "rubiks::" in name
    for prefix in ("void ", "at::native::", "rubiks::", "(anonymous namespace)::", "<unnamed>::"):
        name = name.replace(prefix, "")
    if ours:
        name = name.partition("(")[0]
    return name if len(name) <= 64 else f"{name[:61]}..."


def kernels(trace: profile, device: str) -> list[dict[str, Any]]:
    """Kernels or, on a CPU, operators, by decreasing time."""
    rows = []
    for event in trace.key_averages():
        if event.is_user_annotation or event.key.startswith(MARK):
            continue
        if device == "cuda":
            duration = event.self_device_time_total if event.device_type == DeviceType.CUDA else 0
        else:
            duration = event.self_cpu_time_total
        if duration > 0:
            rows.append({"name": event.key, "calls": event.count, "ms": duration / 1e3})
    total = sum(row["ms"] for row in rows)
    return sorted(({**row, "share": row["ms"] / total} for row in rows), key=lambda row: -row["ms"])


def mark_of(event: Any) -> str | None:
    """The innermost of our annotations, or the optimizer's, around an event on its thread."""
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK)
        if event.name.startswith("Optimizer."):
            return "optimizer/"
        event = event.cpu_parent
    return None


def parts(trace: profile, device: str) -> dict[tuple[str, str], float]:
    """Milliseconds by section and part."""
    events = sorted((e for e in trace.events() if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    # An autograd node has the number of the forward operator that created it.
    made_by: dict[int, str] = {}
    for event in events:
        mark = mark_of(event)
        if mark is not None and event.sequence_nr >= 0 and event.scope == 0:
            made_by[event.sequence_nr] = mark

    def owner(event: Any) -> str:
        mark = mark_of(event)
        while mark is None and event is not None:
            if event.scope == 1:  # of a backward node
                mark = made_by.get(event.sequence_nr)
            event = event.cpu_parent
        return mark or "other/"

    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.is_user_annotation:  # a span, whose kernels are its operators'
            continue
        duration = sum(k.duration for k in event.kernels) if device == "cuda" else event.self_cpu_time_total
        section, _, part = owner(event).partition("/")
        spent[section, part] += duration / 1e3
    found = {key: duration for key, duration in spent.items() if duration > 0}
    return dict(sorted(found.items(), key=lambda item: (SECTIONS.index(item[0][0]), COLUMNS.index(item[0][1]))))


def bandwidth(device: str) -> float:
    """TB/s of a large copy, read and written."""
    if device == "cuda":
        return max(copy_bandwidth(10).values())
    source = torch.randn(2**25)
    target = torch.empty_like(source)
    return 2 * 4 * 2**25 / called(lambda: target.copy_(source), 5) / 1e9


def print_kernels(rows: list[dict[str, Any]], limit: int) -> None:
    print(f"\n{'kernel':<66}{'calls':>6}{'ms':>10}{'share':>8}")
    for row in rows[:limit]:
        print(f"{short(row['name']):<66}{row['calls']:>6}{row['ms']:>10.3f}{row['share']:>8.1%}")
    rest = rows[limit:]
    if rest:
        calls, duration, share = (sum(row[key] for row in rest) for key in ("calls", "ms", "share"))
        print(f"{f'{len(rest)} more':<66}{calls:>6}{duration:>10.3f}{share:>8.1%}")


def print_parts(spent: dict[tuple[str, str], float], moved: dict[str, int], copy: float) -> None:
    """Times by section and part, with the share of a copy's bandwidth that each section reaches."""
    columns = [c for c in COLUMNS if any(part == c for _, part in spent)]
    print(
        f"\n{'ms':<11}" + "".join(f"{c or 'whole':>11}" for c in columns) + f"{'sum':>11}{'least GB':>11}{'of copy':>9}"
    )
    for section in dict.fromkeys(name for name, _ in spent):
        times = [spent.get((section, c), 0.0) for c in columns]
        line = f"{section:<11}" + "".join(f"{t:>11.3f}" if t else f"{'':>11}" for t in times) + f"{sum(times):>11.3f}"
        if section in moved:
            line += f"{moved[section] / 1e9:>11.3f}{moved[section] / sum(times) / 1e9 / copy:>9.1%}"
        print(line)
    sums = [sum(t for (_, part), t in spent.items() if part == c) for c in columns]
    print(f"{'sum':<11}" + "".join(f"{t:>11.3f}" for t in sums) + f"{sum(sums):>11.3f}")


def parse() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="large" if device == "cuda" else "tiny")
    parser.add_argument("--variant", choices=("rubiks3d", "rubiks3d-aq"), default="rubiks3d")
    parser.add_argument("--phase", choices=PHASES, default="inference")
    parser.add_argument("--mode", choices=FAMILY_MODES["rubiks"], default="eager", help="as in network.py")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16" if device == "cuda" else "float32")
    parser.add_argument("--batch", type=int, default=32 if device == "cuda" else 1)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=20 if device == "cuda" else 5)
    parser.add_argument("--rows", type=int, default=25, help="kernels to print")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def analyse(arguments: argparse.Namespace) -> dict[str, Any]:
    model = f"rubiks-{arguments.tier}{arguments.variant.removeprefix('rubiks3d')}"
    names = ("phase", "precision", "batch", "frames", "size", "device")
    setting = {name: getattr(arguments, name) for name in names}
    training = arguments.phase == "training"
    # The plain network on one clip gives the shapes.
    net, run = step(model, "eager", **{**setting, "batch": 1})
    itemsize = 2 if arguments.precision == "bf16" else 4
    moved = {name: n * arguments.batch for name, n in least_bytes(net, run, training, itemsize).items()}
    net, run = step(model, arguments.mode, **setting)
    duration, memory = timed(run, 5 if arguments.device == "cuda" else 2, arguments.repeats, arguments.device)
    if arguments.device == "cuda" and training and itemsize == 2 and supports(net.backbone):  # type: ignore[arg-type]
        net.recorder.enabled = False  # type: ignore[union-attr]
        annotate_fused_blocks()
    elif not arguments.mode.startswith("compiled"):  # whose kernels span parts
        annotate_network(net)
    trace = traced(run, arguments.device)
    copy = bandwidth(arguments.device)
    spent, launched = parts(trace, arguments.device), kernels(trace, arguments.device)
    unlinked = sum(row["ms"] for row in launched) - sum(spent.values())
    if arguments.device == "cuda" and unlinked > 1e-3:
        spent["unlinked", ""] = unlinked
    return {
        "model": model,
        "mode": arguments.mode,
        **setting,
        "ms": duration,
        **memory,
        "copy_tb_per_s": copy,
        "least_bytes": moved,
        "least_ms": sum(moved.values()) / copy / 1e9,
        "share_of_copy": sum(moved.values()) / duration / 1e9 / copy,
        "kernels": launched,
        "parts": [{"section": s, "part": p, "ms": t} for (s, p), t in spent.items()],
    }


def main() -> None:
    arguments = parse()
    torch.backends.cudnn.benchmark = True
    command = [word for word in sys.argv[1:] if word not in ("--json", str(arguments.json))]
    report = {"command": " ".join(["python benchmarks/profile_network.py", *command]), **machine(arguments.device)}
    name = report["device"]
    report |= analyse(arguments) | {"device": name}
    print(f"{name}, PyTorch {report['torch']}, {report['threads']} threads, {report['shift']} shift")
    print(f"{report['model']}, {report['mode']}, {report['phase']}, {report['precision']}, batch {report['batch']}")
    print_kernels(report["kernels"], arguments.rows)
    spent = {(row["section"], row["part"]): row["ms"] for row in report["parts"]}
    print_parts(spent, report["least_bytes"], report["copy_tb_per_s"])
    memory = f", peak {report['peak_gib']:.2f} GiB" if "peak_gib" in report else ""
    print(
        f"\nA step takes {report['ms']:.3f} ms{memory}; its kernels {sum(r['ms'] for r in report['kernels']):.3f} ms."
    )
    print(
        f"The least passes move {sum(report['least_bytes'].values()) / 1e9:.3f} GB, {report['least_ms']:.3f} ms at the "
        f"{report['copy_tb_per_s']:.3f} TB/s of a copy: {report['share_of_copy']:.1%} of it is achieved."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
