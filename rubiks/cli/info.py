"""`rubiks info`: facts about the installation, what a network costs, and what a checkpoint's shifts have learned."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rubiks.errors import InputError

if TYPE_CHECKING:
    from rubiks.models import RubiksNet

# The clips that the published numbers are about.
PUBLISHED = "data=ssv2"

MEMORY = {
    "inference": "most bytes of activations held at the same time, by the modules in float32, without weights and clip",
    "training": "bytes that the modules keep in float32 from the forward pass for the backward pass, without weights",
}


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "tell what runs the operator here, and versions; or what a network has and costs, layer by layer"
    description = (
        "Without arguments: which implementation of the operator serves CPU and CUDA, how it was built, and versions. "
        "With a checkpoint, or choices as for train.py: the network's parameters, multiply-adds and memory, for a clip "
        "as in its training or by default of 8 frames of 224 x 224 pixels, with 174 classes."
    )
    parser = commands.add_parser("info", help=about, description=description)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="CKPT | KEY=VALUE",
        help="a checkpoint, ours or official; a run's or a saved network's folder; an exported file; or choices: "
        "tier=large variant=rubiks3d-aq data.num_frames=16 data.size=256 data.num_classes=400",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--shifts", action="store_true", help="what the checkpoint's shifts have learned: print a table, write pictures"
    )
    parser.add_argument("--out", metavar="FOLDER", default="shifts", help="where pictures go, default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print facts about the installation or about a network, or what a checkpoint's shifts have learned."""
    if arguments.shifts:
        from rubiks.cli import shifts  # imports Lightning and matplotlib, which takes seconds

        file = _checkpoint(arguments.what)
        if file is None:
            raise InputError("--shifts needs one checkpoint: rubiks info CKPT --shifts")
        shifts.describe(str(file), Path(arguments.out))
        return
    from rubiks.cli.facts import collect  # imports PyTorch, which takes seconds

    facts = _network(arguments.what) if arguments.what else collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif "format" in facts:
        _print_exported(facts)
    elif arguments.what:
        _print_network(facts)
    else:
        _print_installation(facts)


def _checkpoint(what: list[str]) -> Path | None:
    """The checkpoint that the arguments name; None for choices."""
    if len(what) != 1 or ("=" in what[0] and not Path(what[0]).exists()):
        return None
    return Path(what[0])


def _network(what: list[str]) -> dict[str, Any]:
    """The numbers of the network that a checkpoint or choices describe."""
    from rubiks.export import exported
    from rubiks.models import RubiksNet, checkpoint

    file = _checkpoint(what)
    if file is not None:
        if exported.is_exported(str(file)):
            own = exported.ExportedFile(str(file))
            facts = {"file": own.path, "file_bytes": file.stat().st_size}
            return {**facts, **own.description.model_dump(mode="json"), **own.facts()}
        saved = checkpoint.read(file)
        clip = saved.preprocessing
        facts = {"file": saved.file, "file_bytes": Path(saved.file).stat().st_size}
        return facts | _numbers(RubiksNet.from_saved(saved), clip.num_frames, clip.size)

    from rubiks.cli.entry import training  # imports Lightning, which takes seconds

    if wrong := [word for word in what if "=" not in word]:
        raise InputError(f"{wrong[0]}: expected either one checkpoint or choices, KEY=VALUE, got {' '.join(what)}")
    has = {key: any(choice.startswith(f"{key}=") for choice in what) for key in ("data", "experiment", "data.root")}
    first = [] if has["data"] or has["experiment"] else [PUBLISHED]
    settings = training([*first, *what, *([] if has["data.root"] else ["data.root=."])])
    source, sampling = settings.data.source, settings.data.sampling
    if source.num_classes is None:
        raise InputError(f"data={source.format} does not say how many classes there are; add data.num_classes=NUMBER")
    tier, variant, frames = settings.tier.name, settings.variant.name, sampling.num_frames
    net = RubiksNet(tier, source.num_classes, variant, frames, causal=settings.causal)
    budget = None if settings.aq is None else (settings.aq.budget, settings.aq.per_layer)
    return _numbers(net, frames, sampling.size, budget)


def _numbers(net: RubiksNet, frames: int, size: int, budget: tuple[float, bool] | None = None) -> dict[str, Any]:
    """All numbers of a network; with a budget, those of inference hold once its temporal attention is hard."""
    import torch

    from rubiks.models import cost

    training = cost.saved_bytes(net, frames, size)
    if budget is not None:
        net.harden(*budget)
    stages = cost.stages(net, frames, size)
    return {
        "tier": net.tier,
        "variant": net.variant,
        "causal": net.causal,
        "num_classes": net.num_classes,
        "clip": [frames, 3, size, size],
        "parameters": sum(stage.parameters for stage in stages),
        "multiply_adds": sum(stage.multiply_adds for stage in stages),
        "rule": cost.RULE,
        "flop_counter": cost.counted_flops(net, frames, size),
        **({"temporal_share": net.temporal_share()} if net.attention_shifts() else {}),
        "weight_bytes": {str(kind)[6:]: cost.weight_bytes(net, kind) for kind in (torch.float32, torch.bfloat16)},
        "inference_bytes": cost.peak_bytes(net, frames, size),
        "training_bytes": training,
        "stages": [vars(stage) for stage in stages],
    }


def _print_exported(facts: dict[str, Any]) -> None:
    shown = facts["preprocessing"]
    height, width = shown["size"]
    print(f"{facts['file']}: {_megabytes(facts['file_bytes'])}, {facts['runtime']}, {facts['precision']}")
    print(f"tier {facts['tier']}, variant {facts['variant']}, {facts['num_classes']} classes")
    pixels = f"of {height} x {width} pixels, {shown['input']}"
    if "states" in facts:
        rate = f"about {shown['frames_per_second']:g} frames/s as in training"
        print(f"a stream: one frame at a time {pixels}; {rate}")
        print(f"{len(facts['states'])} states, which begin with zeros; batch comes before these shapes")
        for state in facts["states"]:
            print(f"  {state['name']} -> {state['next']}: {' x '.join(map(str, state['shape']))}, {state['holds']}")
    else:
        frames = " to ".join(str(number) for number in sorted({shown["min_frames"], shown["max_frames"]}))
        print(f"clips of {frames} frames {pixels}; {shown['sampling']} sampling")
    print(f"from a checkpoint with SHA-256 {facts['source_sha256']}, by rubiks {facts['rubiks_version']}")


def _print_network(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    frames, _, height, width = facts["clip"]
    variant = f"{'causal ' * facts['causal']}variant {facts['variant']}"
    title = f"tier {facts['tier']}, {variant}, {facts['num_classes']} classes"
    table = Table(title=f"{title}; a clip of {frames} x {height} x {width}")
    table.add_column("part")
    for column in ("output", "values", "parameters", "multiply-adds"):
        table.add_column(column, justify="right")
    for stage in facts["stages"]:
        shape = stage["output"]
        numbers = (f"{n:,}" for n in (prod(shape), stage["parameters"], stage["multiply_adds"]))
        table.add_row(stage["name"], " x ".join(map(str, shape)), *numbers)
    lines = Table.grid(padding=(0, 2))
    lines.add_row("parameters", f"{facts['parameters']:,}")
    lines.add_row("multiply-adds", f"{facts['multiply_adds'] / 1e9:.2f} G: {facts['rule']}")
    counted = "2 for each multiply-add of convolutions and linear layers, nothing else"
    lines.add_row("FlopCounterMode", f"{facts['flop_counter'] / 1e9:.2f} G, by PyTorch: {counted}")
    if "temporal_share" in facts:
        share = facts["temporal_share"]
        soft = "soft attention: every channel mixes frames, no budget holds yet"
        lines.add_row("shifted in time", soft if share is None else f"{share:.2%} of the channels, by whole frames")
    sizes = ", ".join(f"{_megabytes(size)} in {kind}" for kind, size in facts["weight_bytes"].items())
    lines.add_row("weights", sizes)
    if "file" in facts:
        lines.add_row("file", f"{_megabytes(facts['file_bytes'])}, {facts['file']}")
    for phase, meaning in MEMORY.items():
        lines.add_row(phase, f"{_megabytes(facts[f'{phase}_bytes'])}: {meaning}")
    console = Console()
    console.print(table)
    console.print(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _print_installation(facts: dict[str, Any]) -> None:
    for title, entries in facts.items():
        print(title)
        for name, value in entries.items():
            text = "\n".join(value) if isinstance(value, list) else value
            for line in text.splitlines() or ["none"]:
                print(f"  {name:<14}{line}")
                name = ""
