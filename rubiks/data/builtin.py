"""The built-in data set: a small Something-Something of drawn clips, made on first use.

The folder has the layout and the annotation format of Something-Something-V2: ``labels.json``, ``train.json``,
``validation.json`` and VP9 files ``20bn-something-something-v2/<id>.webm``. What the clips show is in ``scenes``.
"""

import contextlib
import errno
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rubiks.data import scenes
from rubiks.data.scenes import FPS, LEVELS
from rubiks.data.workers import cores
from rubiks.errors import InputError

__all__ = ["DEFAULT_VIDEOS", "LEVELS", "class_names", "generate"]

# Videos for training and for validation unless told otherwise.
DEFAULT_VIDEOS: dict[str, tuple[int, int]] = {"plain": (3000, 400), "textured": (6000, 600)}

_VIDEO_FOLDER = "20bn-something-something-v2"
_ANNOTATIONS = ("labels.json", "train.json", "validation.json")
_TEMPORARY = ".unfinished-"

# One thread and no random number or date in the file: the same frames always give the same bytes.
_ENCODER = {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "lag-in-frames": "0", "threads": "1"}

# What a worker process runs. Clips are always made in processes that load no decord: it brings a libvpx of its own
# that PyAV would then call, and fail. The packages' own __init__ files are left out, as they import torch, which takes
# seconds; and unlike multiprocessing's workers, these don't run the calling script again.
_WORKER = """
import sys, types
for name, folder in zip(("rubiks", "rubiks.data"), sys.argv[1:]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from rubiks.data.builtin import _serve
_serve()
"""


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
    """Makes the data set, or what an interrupted call left to make; a finished one is returned untouched.

    Args:
        root: the folder to make the data set's own folder in; it is made where missing.
        level: "plain" (one object on a flat background) or "textured" (moving background, distractors, camera shake).
        train_videos: number of training clips; ``DEFAULT_VIDEOS[level]`` if None.
        val_videos: number of validation clips; likewise.
        seed: 0 or more. The same arguments give the same bytes in every file.
        workers: number of processes; one for each CPU that this process may use if None.
        progress: show a bar where standard output is a terminal, else one line at the start and one at the end.

    Returns:
        The folder ``root/{level}-{train_videos}+{val_videos}-seed{seed}``.

    Raises:
        InputError: an argument is wrong, or a file cannot be written (nothing half-written stays).
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
    with _disk_errors(folder):
        if all((folder / name).is_file() for name in _ANNOTATIONS):
            return folder

    videos = folder / _VIDEO_FOLDER
    plan = Plan(level, seed, train_videos, val_videos)
    with _disk_errors(videos):
        videos.mkdir(parents=True, exist_ok=True)
        _remove_temporary(folder)
    try:
        with _report(progress, plan, folder) as advance:
            missing = sum(not _is_made(videos / f"{clip.video_id}.webm") for clip in plan.clips())
            if missing:  # starting a process takes as long as some clips
                _make_in_processes(videos, plan, min(workers, 1 + missing // 8), advance)
        _write_annotations(folder, plan)
    finally:
        with contextlib.suppress(OSError):
            _remove_temporary(folder)
    return folder


def _check(key: str, value: Any, least: int, reason: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{key}: expected a whole number of at least {least}, {reason}got {value!r}. Change {key}.")


# ------------------------------------------------------------------------------------------------------------ plan


class Clip(NamedTuple):
    """One video of the data set."""

    video_id: int  # unique over both splits
    split: int  # 0 for training, 1 for validation
    number: int  # in its split, from 0
    label: int


class Plan(NamedTuple):
    """What decides the content of the data set."""

    level: str
    seed: int
    train_videos: int
    val_videos: int

    def clips(self) -> list[Clip]:
        """All clips: in each split equally many of each class, or one more, in random order."""
        clips: list[Clip] = []
        for split, count in enumerate((self.train_videos, self.val_videos)):
            labels = self._generator(split, 0).permutation(np.arange(count) % len(class_names(self.level)))
            clips += [Clip(len(clips) + 1 + i, split, i, label) for i, label in enumerate(labels.tolist())]
        return clips

    def rng(self, clip: Clip) -> np.random.Generator:
        """The clip's own generator, so that it comes out the same whichever process draws it."""
        return self._generator(clip.split, 1 + clip.number)

    def _generator(self, split: int, key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, LEVELS.index(self.level), split, key])


@contextlib.contextmanager
def _report(progress: bool, plan: Plan, folder: Path) -> Iterator[Callable[[], None]]:
    """Tells the user what goes on; yields the function to call after each clip."""
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
        print(f"Made it in {time.monotonic() - start:.0f} seconds", flush=True)


# ----------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says against writing to path into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            what, remedy = "the disk is full", "Free some space and run again: it goes on where it stopped"
        else:
            what, remedy = error.strerror or str(error), "Make that folder writable"
        raise InputError(
            f"data.root: expected a folder to write the built-in data set to, but cannot write {path.name} "
            f"in {path.parent}: {what}. {remedy}, or set data.root to another folder."
        ) from error


def _write(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    with _disk_errors(path):
        while True:
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
                return
            except FileNotFoundError:
                # A second process that makes the same data set took the file for a leftover: write it again.
                if not path.parent.is_dir():
                    raise
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def _remove_temporary(folder: Path) -> None:
    """Removes what killed processes left."""
    for path in (*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_VIDEO_FOLDER}/{_TEMPORARY}*")):
        path.unlink(missing_ok=True)


def _is_made(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0  # a power cut can leave a file empty


def _write_annotations(folder: Path, plan: Plan) -> None:
    """Writes the text files; the annotations come last, as they mean that the data set is finished."""
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

    _write(folder / "README.txt", readme.encode())
    for name, content in zip(_ANNOTATIONS, (names, *entries), strict=True):
        _write(folder / name, json.dumps(content, indent=1).encode())


# ---------------------------------------------------------------------------------------------------------- videos


def _encode(frames: scenes.Frames) -> bytes:
    """A VP9 webm file of RGB frames (frames, height, width, 3)."""
    import av  # only here, in the worker processes: see _WORKER

    file = io.BytesIO()
    with av.open(file, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options={**_ENCODER, "flags": "+bitexact"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _make(videos: Path, plan: Plan, clips: Iterable[Clip], advance: Callable[[], None]) -> None:
    """Draws and writes the clips that are not there yet."""
    for clip in clips:
        path = videos / f"{clip.video_id}.webm"
        if not _is_made(path):
            _write(path, _encode(scenes.draw(plan.rng(clip), plan.level, clip.label)))
        advance()


def _make_in_processes(videos: Path, plan: Plan, workers: int, advance: Callable[[], None]) -> None:
    """Shares the clips out to worker processes.

    All of them write to one pipe: an empty line for each clip, or the message of an InputError as a line of JSON. When
    this process is killed the pipe breaks, which ends them.
    """
    here = Path(__file__).resolve().parent
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": search_path, "PYTHONSAFEPATH": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    read_end, write_end = os.pipe()
    try:
        with open(read_end, encoding="utf-8") as replies:
            try:
                for worker in range(workers):
                    job = json.dumps([str(videos.absolute()), plan, worker, workers])
                    command = [sys.executable, "-c", _WORKER, str(here.parent), str(here), job]
                    # A session of its own keeps the terminal's Ctrl-C from the worker: this process ends it.
                    processes.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.DEVNULL,
                            stdout=write_end,
                            env=environment,
                            start_new_session=True,
                        )
                    )
            finally:
                os.close(write_end)
            for line in replies:
                if message := line.strip():
                    raise InputError(json.loads(message))
                advance()
        for process in processes:
            if code := process.wait():
                raise RuntimeError(
                    f"a process that made videos in {videos} ended with status {code}; if memory ran out, "
                    "use fewer processes. Running again goes on where it stopped."
                )
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _serve() -> None:
    """The work of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder, plan_fields, worker, workers = json.loads(sys.argv[3])
    plan = Plan(*plan_fields)
    with contextlib.suppress(BrokenPipeError):
        try:
            _make(Path(folder), plan, plan.clips()[worker::workers], lambda: _reply(b""))
        except InputError as error:
            _reply(json.dumps(str(error)).encode())


def _reply(message: bytes) -> None:
    os.write(1, message + b"\n")  # one write is one piece of the pipe, also with several writers
