"""How fast one core reads videos with each reader and from each form of the files, and how many cores feed one GPU.

    python benchmarks/data.py raw=/data/raw small=/data/small [--readers decord pyav] [--json FILE]

A form is a folder of video files: the originals, or the same videos encoded anew with a short side of 256 pixels and
many key frames. Each is read as training reads it, one random clip and crop of a video. `rubiks bench-data` does the
same for a data set with its lists. Rounds alternate over readers and forms, and the median round counts, so that other
work on the machine touches all alike. Videos are in the operating system's memory after the first round: the disk's
speed does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from rubiks.data import speed
from rubiks.data.readers import READERS, check_reader
from rubiks.data.records import VideoRecord
from rubiks.data.views import TrainingViews
from rubiks.errors import InputError

NETWORKS = Path(__file__).parent / "results" / "network_h100.json"


def videos(folder: Path) -> list[VideoRecord]:
    """The files of a folder and those below it, sorted."""
    found = [VideoRecord(str(path), 0) for path in sorted(folder.rglob("*")) if path.is_file()]
    if not found:
        raise InputError(f"{folder}: expected a folder of videos, found no files")
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every form with every reader."""
    for reader in arguments.readers:
        check_reader(reader)
    forms = {name: videos(Path(folder)) for name, _, folder in (form.partition("=") for form in arguments.forms)}
    views = TrainingViews(arguments.frames, arguments.size, (1.0, 0.875, 0.75, 0.66))
    needs = speed.measured_clips_per_second(NETWORKS, arguments.tier, arguments.variant)
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for form, records in forms.items():
            for reader in arguments.readers:
                row = {"form": form} | speed.measure(records * arguments.repeat, views, reader, arguments.batch)
                rounds.setdefault((form, reader), []).append(row)
    rows = []
    for (form, _), measured in rounds.items():
        middle = statistics.median_low(row["videos_per_core_second"] for row in measured)
        row = next(row for row in measured if row["videos_per_core_second"] == middle)
        rows.append(speed.with_cores(row, needs))
        print(f"{form:<16}{speed.describe(rows[-1])}", flush=True)
    command = [word for word in sys.argv[1:] if word not in ("--json", str(arguments.json))]
    return {
        "command": " ".join(["python benchmarks/data.py", *command]),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tier": arguments.tier,
        "variant": arguments.variant,
        "clips_per_second": needs,
        "rows": rows,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of reading videos.")
    parser.add_argument("forms", nargs="+", metavar="FORM=FOLDER")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=["decord", "pyav"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=4, help="how often a round reads each video")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tier", default="tiny", help="whose clips per second the cores are to feed")
    parser.add_argument("--variant", default="rubiks3d")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    try:
        report = run(arguments)
    except InputError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
