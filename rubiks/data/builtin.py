"""The built-in data set: a small Something-Something of drawn clips, made on first use.

The folder has the layout and the annotation format of Something-Something-V2: ``labels.json``, ``train.json``,
``validation.json`` and VP9 files ``20bn-something-something-v2/<id>.webm``. What the clips show is in ``scenes``.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rubiks.data import scenes
from rubiks.data.builtin_clips import VIDEO_FOLDER, Plan, disk_errors, is_made, remove_temporary, write
from rubiks.data.builtin_workers import make_in_processes
from rubiks.data.scenes import LEVELS
from rubiks.data.workers import cores
from rubiks.errors import InputError

__all__ = ["DEFAULT_VIDEOS", "LEVELS", "class_names", "generate"]

# Default numbers of training and validation videos.
DEFAULT_VIDEOS: dict[str, tuple[int, int]] = {"plain": (3000, 400), "textured": (6000, 600)}

_ANNOTATIONS = ("labels.json", "train.json", "validation.json")


def class_names(level: str) -> list[str]:
    """The classes of a level in label order, as templates such as "Moving [something] from left to right".

    Raises:
        InputError: the level is unknown.
    """
    if level not in LEVELS:
        raise InputError(f"data.level: expected {' or '.join(LEVELS)}, got {level!r}. Choose one of these.")
    return scenes.class_names(level)


def generate(
    root: str | os.PathLike[str],
    level: str = "plain",
    train_videos: int | None = None,
    val_videos: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Makes the data set, or the rest of it after an interrupted call; a finished one is returned untouched.

    Args:
        root: the folder to make the data set's folder in; it is made if missing.
        level: "plain" (one object on a flat background) or "textured" (moving background, distractors, camera shake).
        train_videos: number of training clips; ``DEFAULT_VIDEOS[level]`` if None.
        val_videos: number of validation clips; likewise.
        seed: 0 or more. The same arguments give the same bytes in every file.
        workers: number of processes; one for each CPU that this process may use if None.
        progress: show a bar if standard output is a terminal, else one line at the start and one at the end.

    Returns:
        The folder ``root/{level}-{train_videos}+{val_videos}-seed{seed}``.

    Raises:
        InputError: an argument is wrong, or a file cannot be written (no half-written file is left).
    """
    classes = len(class_names(level))
    if train_videos is None:
        train_videos = DEFAULT_VIDEOS[level][0]
    if val_videos is None:
        val_videos = DEFAULT_VIDEOS[level][1]
    if workers is None:
        workers = cores()
    reason = f"one for each class of the level {level}, "
    _check("data.train_videos", train_videos, classes, reason)
    _check("data.val_videos", val_videos, classes, reason)
    _check("seed", seed, 0)
    _check("workers", workers, 1)

    folder = Path(root).expanduser() / f"{level}-{train_videos}+{val_videos}-seed{seed}"
    with disk_errors(folder):
        if all((folder / name).is_file() for name in _ANNOTATIONS):
            return folder

    videos = folder / VIDEO_FOLDER
    plan = Plan(level, seed, train_videos, val_videos)
    with disk_errors(videos):
        videos.mkdir(parents=True, exist_ok=True)
        remove_temporary(folder)
    try:
        with _report(progress, plan, folder) as advance:
            missing = sum(not is_made(videos / f"{clip.video_id}.webm") for clip in plan.clips())
            if missing:  # starting a process takes as long as a few clips
                make_in_processes(videos, plan, min(workers, 1 + missing // 8), advance)
        _write_annotations(folder, plan)
    finally:
        with contextlib.suppress(OSError):
            remove_temporary(folder)
    return folder


def _check(key: str, value: Any, least: int, reason: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{key}: expected a whole number of at least {least}, {reason}got {value!r}. Change {key}.")


@contextlib.contextmanager
def _report(progress: bool, plan: Plan, folder: Path) -> Iterator[Callable[[], None]]:
    """Shows the user the progress; yields the function to call after each clip."""
    start, total = time.monotonic(), plan.train_videos + plan.val_videos
    if progress:
        print(f"Making the built-in data set ({plan.level}, {total} videos) in {folder}", flush=True)
    if progress and sys.stdout.isatty():
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        ) as bar:
            task = bar.add_task("Drawing videos", total=total)
            yield lambda: bar.advance(task)
    else:
        yield lambda: None
    if progress:
        print(f"Made the data set in {time.monotonic() - start:.0f} seconds", flush=True)


def _write_annotations(folder: Path, plan: Plan) -> None:
    """Writes the text files; the annotations come last, as they mark the data set as finished."""
    templates = class_names(plan.level)
    readme = (
        "Drawn clips in the layout of Something-Something-V2, made by rubiks.data.builtin.\n"
        f"Level {plan.level} ({len(templates)} classes), seed {plan.seed}: "
        f"{plan.train_videos} training and {plan.val_videos} validation videos.\n"
        "This folder can be deleted; it is made again when needed.\n"
    )
    entries: tuple[list[dict[str, Any]], ...] = ([], [])
    for clip in plan.clips():
        template = templates[clip.label]
        things = [str(look) for look in scenes.cast(plan.rng(clip), plan.level, clip.label)]
        text = template.lower()
        for thing in things:
            text = text.replace("[something]", thing, 1)
        entry = {"id": str(clip.video_id), "label": text, "template": template, "placeholders": things}
        entries[clip.split].append(entry)
    names = {template.replace("[", "").replace("]", ""): str(i) for i, template in enumerate(templates)}

    write(folder / "README.txt", readme.encode())
    for name, content in zip(_ANNOTATIONS, (names, *entries), strict=True):
        write(folder / name, json.dumps(content, indent=1).encode())
