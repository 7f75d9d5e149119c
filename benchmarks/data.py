"""How fast one core reads videos, from the originals and as `rubiks prepare` writes them, and what limits it.

    python benchmarks/data.py webm=/data/some-ssv2 mp4=/data/some-k400 [--readers decord pyav] [--memory] [--json FILE]

Each argument names a folder of original videos. They are read as in training, from one random clip and crop of each to
a collated batch of bytes, with every reader, and in each form of video file that `rubiks prepare` writes, which are
made first. For comparison, decord alone opens the originals and decodes the same frames. Rounds alternate over all of
these, and ratios are medians over the rounds of CPU time within one round, so that other work on the machine affects
all of them equally. Videos are in the operating system's memory after the first round: the disk's speed does not count.
`rubiks bench-data` measures a data set with its lists.

`--memory` also reads 2,000 videos with two workers, and reports how much their memory grew after the first 200.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from rubiks.data import speed
from rubiks.data.datamodule import Loading, VideoDataModule
from rubiks.data.manifest import Manifest
from rubiks.data.prepare import Job, prepare, target_name
from rubiks.data.readers import Reader, check_reader
from rubiks.data.records import VideoRecord
from rubiks.data.views import TrainingViews
from rubiks.data.workers import cores
from rubiks.errors import InputError

NETWORKS = Path(__file__).parent / "results" / "network_h200.json"
FORMS = ("jpeg", "h264")
PACKAGES = ("av", "decord", "numpy", "simplejpeg", "torch", "torchcodec", "torchvision")


def videos(folder: Path) -> list[VideoRecord]:
    """The files of a folder and those below it, sorted."""
    found = [VideoRecord(str(path), 0) for path in sorted(folder.rglob("*")) if path.is_file()]
    if not found:
        raise InputError(f"{folder}: expected a folder of videos, found no files")
    return found


def prepared(records: Sequence[VideoRecord], folder: Path, form: str) -> list[VideoRecord]:
    """The videos as `rubiks prepare` writes them, with the entries of the manifest."""
    manifest = Manifest(folder)
    jobs = []
    for number, record in enumerate(records):
        name = target_name(f"{number}-{os.path.basename(record.path)}", form)
        jobs.append(Job(record, folder / name, name, form, 256))
    for path, reason in prepare(jobs, manifest, os.cpu_count() or 1, 600).items():
        raise InputError(f"{path}: {reason}; remove it from the folder")
    return manifest.apply([job.written(manifest.entries[job.name].frames) for job in jobs])


def bare_decord(records: Sequence[VideoRecord], views: TrainingViews) -> float:
    """Videos a second of CPU time for opening them with decord and decoding the frames that training would."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    start = time.process_time()
    for index, record in enumerate(records):
        video = decord.VideoReader(record.path, num_threads=1)
        indices = views.frame_indices(len(video), np.random.default_rng(index))
        video.get_batch(indices.ravel().tolist()).asnumpy()
    return len(records) / (time.process_time() - start)


def megabytes(process: int) -> float:
    """Memory of a process, without what it shares with others (Linux)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1e3


def memory(records: Sequence[VideoRecord], views: TrainingViews, workers: int, marks: tuple[int, int]) -> list[float]:
    """Megabytes of this process and of each loader worker after each number of videos."""
    repeated = [records[number % len(records)] for number in range(marks[1])]
    batch = 20
    data = VideoDataModule(repeated, [], views, views, batch, batch, Loading(workers=workers))
    taken = []
    for number, _ in enumerate(data.train_dataloader(), start=1):
        if number * batch in marks:
            processes = [os.getpid(), *(child.pid or 0 for child in multiprocessing.active_children())]
            taken.append([megabytes(process) for process in processes])
    return [after - before for before, after in zip(*taken, strict=True)]


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure; `work` is an empty folder for the prepared videos."""
    for reader in arguments.readers:
        check_reader(reader)
    views = TrainingViews(arguments.frames, arguments.size, (1.0, 0.875, 0.75, 0.66))
    needs = speed.measured_clips_per_second(NETWORKS, arguments.tier, arguments.variant)
    command = [word for word in sys.argv[1:] if word not in ("--json", str(arguments.json))]
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/data.py", *command]),
        "processor": processor(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "tier": arguments.tier,
        "variant": arguments.variant,
        "clips_per_second": needs,
        "rows": [],
        "ratios": {},
    }
    for source, _, folder in (word.partition("=") for word in arguments.sources):
        raw = videos(Path(folder))
        forms = {form: prepared(raw, work / source / form, form) for form in FORMS}
        ways = [(source, reader, raw) for reader in arguments.readers]
        ways += [(f"{source} {form}", "auto", records) for form, records in forms.items()]
        rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
        bare = []
        for _ in range(arguments.rounds):
            for name, reader, records in ways:
                row = {"form": name, "bytes": sum(os.path.getsize(r.path) for r in records) // len(records)}
                row |= speed.measure(list(records) * arguments.repeat, views, reader, arguments.batch)
                rounds.setdefault((name, reader), []).append(row)
            if version_of("decord"):
                bare.append(bare_decord(raw * arguments.repeat, views))
        for measured in rounds.values():
            middle = statistics.median_low(row["videos_per_core_second"] for row in measured)
            row = next(row for row in measured if row["videos_per_core_second"] == middle)
            report["rows"].append(speed.with_cores(row, needs))
            print(f"{row['form']:<12}{row['bytes'] / 1e3:8,.0f} kB  {speed.describe(report['rows'][-1])}", flush=True)
        rates = {key: [row["videos_per_core_second"] for row in measured] for key, measured in rounds.items()}
        first = rates[source, arguments.readers[0]]
        ratios = {}
        for reader in arguments.readers if bare else ():
            name = source if reader == arguments.readers[0] else f"{source} {reader}"
            ratios[f"{name} / bare decord"] = rates[source, reader], bare
        ratios |= {f"{source} {form} / {source}": (rates[f"{source} {form}", "auto"], first) for form in FORMS}
        for name, (over, under) in ratios.items():
            report["ratios"][name] = statistics.median(a / b for a, b in zip(over, under, strict=True))
            print(f"{name}: {report['ratios'][name]:.2f}", flush=True)
        if arguments.memory:
            for name, records in ((source, raw), (f"{source} {FORMS[0]}", forms[FORMS[0]])):
                gained = memory(records, views, 2, (200, 2000))
                report.setdefault("megabytes_gained", {})[name] = gained
                print(f"{name}: {max(gained):.0f} MB gained from 200 to 2,000 videos, of this process and 2 workers")
    return report


def processor() -> str:
    """The processor's name, if Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of reading videos.")
    parser.add_argument("sources", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--readers", nargs="+", choices=get_args(Reader), default=["auto"], help="of the originals")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=4, help="how often a round reads each video")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tier", default="tiny", help="whose clips per second the cores are to feed")
    parser.add_argument("--variant", default="rubiks3d")
    parser.add_argument("--memory", action="store_true", help="also read 2,000 videos with two workers")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    try:
        with tempfile.TemporaryDirectory() as work:
            report = run(arguments, Path(work))
    except InputError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
