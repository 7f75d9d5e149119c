"""`rubiks export`: a network as a file for other runtimes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rubiks.errors import InputError


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "write a network as ONNX, OpenVINO, torch.export or AOTInductor file, which runs without this package"
    description = (
        "Write a network as a file for another runtime. Its input is pixel_values (batch, frames, 3, height, width), "
        "its output logits (batch, classes), for any batch. The file is kept only if its logits are those of PyTorch. "
        "With --stream, for causal networks, it takes one frame at a time."
    )
    parser = commands.add_parser("export", help=about, description=description)
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint, ours or official, a run's or a saved folder")
    parser.add_argument(
        "--to",
        choices=("onnx", "openvino", "pt2", "aoti"),
        required=True,
        help="the format; pt2: torch.export, aoti: the same compiled by AOTInductor",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", required=True, help="the file, ending in .onnx, .xml or .pt2"
    )
    parser.add_argument("--frames", metavar="T", help="frames per clip; default: as trained")
    parser.add_argument("--size", metavar="SIDE|HxW", help="of the frames, in pixels; default: as trained")
    parser.add_argument(
        "--uint8", action="store_true", help="take RGB from 0 to 255 as uint8, and scale and normalise it in the file"
    )
    parser.add_argument("--dynamic-frames", action="store_true", help="take any number of frames from 4 to 256")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="a causal network frame by frame: takes pixel_values (batch, 3, height, width) and states, gives this "
        "frame's logits and the next states",
    )
    parser.add_argument(
        "--int8",
        metavar="VIDEOS",
        help="with --to openvino: quantise to int8, by clips of these videos (a folder, a pattern, or a .txt list); "
        "some hundred are enough",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Export the network."""
    frames = None if arguments.frames is None else _frames(arguments.frames)
    size = None if arguments.size is None else _size(arguments.size)
    form, out = arguments.to, arguments.out
    if arguments.int8 is not None and form != "openvino":
        raise InputError(f"--int8 needs --to openvino, got --to {form}")
    if arguments.stream:
        given = {"--frames": frames, "--dynamic-frames": arguments.dynamic_frames, "--int8": arguments.int8}
        if wrong := [name for name, value in given.items() if value not in (None, False)]:
            raise InputError(f"{wrong[0]} does not go with --stream; leave one of them out")
    from rubiks.export.export import clip_shape, export  # imports PyTorch, which takes seconds
    from rubiks.export.formats import FORMATS
    from rubiks.export.stream import export_stream
    from rubiks.models import checkpoint

    saved = checkpoint.read(arguments.ckpt)
    calibration = None
    if arguments.int8 is not None:
        from rubiks.predict import calibration as videos

        calibration = videos.clips(arguments.int8, clip_shape(saved, frames, size), saved.preprocessing)
    if arguments.stream:
        exported = export_stream(saved, form, out, size, arguments.uint8)
    else:
        exported = export(saved, form, out, frames, size, arguments.uint8, arguments.dynamic_frames, calibration)
    takes = f"{'frames' if arguments.stream else 'clips'} of {' x '.join(map(str, exported.clip))}"
    megabytes = sum(path.stat().st_size for path in FORMATS[form].files(out)) / 1e6
    print(
        f"{out}: {megabytes:.1f} MB, for {takes}; its logits differ from PyTorch's by at most "
        f"{exported.difference:.1e} of the largest"
    )
    if calibration is not None:
        print(
            f"int8: on {len(calibration)} calibration clips the highest class is the same for {exported.agreement:.1%}"
        )


def _frames(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise InputError(f"--frames: expected a whole number of at least 1, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """From "224" to (224, 224), from "224x320" to (224, 320)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch(r"0*[1-9]\d*", side) for side in sides):
        raise InputError(f"--size: expected a side such as 224, or height and width such as 224x320, got {text!r}")
    return int(sides[0]), int(sides[-1])
