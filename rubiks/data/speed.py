"""How fast one core reads videos, where the time goes, and how many cores feed a GPU."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rubiks.data.batches import collate
from rubiks.data.dataset import Views, read_clips
from rubiks.data.decode import VideoFile
from rubiks.data.estimate import is_decoded_from_start
from rubiks.data.records import VideoRecord
from rubiks.errors import InputError, VideoError

STAGES = ("open", "decode", "views", "collate", "copy")


def measure(records: Sequence[VideoRecord], views: Views, reader: str, batch_size: int) -> dict[str, Any]:
    """Read videos one after the other in this process, as a loader's worker does.

    The stages are: open (with counting the frames), decode (with seeking), views (resize and crop), collate, and copy
    to the GPU (only if there is one). Files that the operating system has cached do not show the disk's speed.

    Returns:
        `wall_ms` and `cpu_ms`: milliseconds per video by stage, the latter over all threads; `videos_per_core_second`,
        from the CPU time, and `videos_per_second`, from the wall time, both without copy; `videos`, `unreadable`,
        `clips_per_video`; `single_key_frame` and `seeking_not_proven`, the numbers of files in which all frames before
        those of a clip are decoded too, for either reason.

    Raises:
        InputError: none of the videos can be read.
    """
    wall, cpu = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def timed(stage: str) -> Iterator[None]:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            wall[stage] += time.perf_counter() - wall_start
            cpu[stage] += time.process_time() - cpu_start

    threads, unreadable, single, unproven = torch.get_num_threads(), 0, 0, 0
    torch.set_num_threads(1)  # as in a worker
    try:
        with contextlib.suppress(VideoError):
            read_clips(records[0], views, reader, np.random.default_rng(0))  # imports the library
        for start in range(0, len(records), batch_size):
            samples: list[Any] = []
            for index in range(start, min(start + batch_size, len(records))):
                rng = np.random.default_rng(index)
                try:
                    video, clips = read_clips(records[index], views, reader, rng, timed)
                except VideoError:
                    unreadable += 1
                    continue
                if isinstance(video, VideoFile) and is_decoded_from_start(video):
                    single += video.seek != "none"
                    unproven += video.seek == "none"
                with timed("views"):
                    made, label = views(clips, records[index].label, rng)
                    samples.append({"views": made, "label": label, "index": index, "reader": video.reader})
            with timed("collate"):
                batch = collate(samples)
            if torch.cuda.is_available() and samples:
                with timed("copy"):
                    batch["views"].pin_memory().to("cuda")
                    torch.cuda.synchronize()
    finally:
        torch.set_num_threads(threads)
    videos = len(records) - unreadable
    if not videos:
        raise InputError(f"none of the {len(records)} videos can be read; the first is {records[0].path}")
    reading = STAGES[:-1]
    return {
        "reader": reader,
        "videos": videos,
        "unreadable": unreadable,
        "single_key_frame": single,
        "seeking_not_proven": unproven,
        "clips_per_video": len(made),
        "videos_per_core_second": videos / sum(cpu[stage] for stage in reading),
        "videos_per_second": videos / sum(wall[stage] for stage in reading),
        "wall_ms": {stage: 1e3 * seconds / videos for stage, seconds in wall.items()},
        "cpu_ms": {stage: 1e3 * seconds / videos for stage, seconds in cpu.items()},
    }


def measured_clips_per_second(report: Path, tier: str, variant: str) -> dict[str, float]:
    """Clips a second of one GPU by phase, training and inference, from a report of benchmarks/network.py.

    Empty if the report is missing or has no row for the network.
    """
    if not report.is_file():
        return {}
    name = f"rubiks-{tier}" + {"rubiks3d": "", "rubiks3d-aq": "-aq"}.get(variant, f"-{variant}")
    rates: dict[str, float] = {}
    for row in json.loads(report.read_text(encoding="utf-8"))["rows"]:
        if row["model"] == name and "clips_per_second" in row:
            rates[row["phase"]] = max(row["clips_per_second"], rates.get(row["phase"], 0.0))
    return rates


def with_cores(row: dict[str, Any], clips_per_second: dict[str, float]) -> dict[str, Any]:
    """The row, with how many cores read as many clips a second as the GPU can use."""
    read = row["videos_per_core_second"] * row["clips_per_video"]
    return row | {"cores": {phase: rate / read for phase, rate in clips_per_second.items()}}


def describe(row: dict[str, Any]) -> str:
    """One line for the user."""
    stages = "  ".join(f"{stage} {row['cpu_ms'][stage]:.1f}" for stage in STAGES if row["wall_ms"][stage])
    parts = [f"{row['reader']:<11}{row['videos_per_core_second']:7.1f} videos/s per core; CPU ms per video: {stages}"]
    parts += [f"{number:,.0f} cores needed for {phase}" for phase, number in row["cores"].items()]
    if row["unreadable"]:
        parts.append(f"{row['unreadable']} unreadable")
    return "; ".join(parts)
