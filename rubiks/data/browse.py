"""A page about a data set, with moving previews, that needs nothing installed to look at.

index.html            the page
previews/00001.webp   what it shows
.rubiks-browse        says that the folder is ours, and may be written again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rubiks.data.dataset import Views
from rubiks.data.previews import Job, Spread, make
from rubiks.data.records import VideoRecord
from rubiks.errors import InputError, VideoError
from rubiks.pages import page

PAGE, FOLDER, MARK = "index.html", "previews", ".rubiks-browse"
VIEWS = 4  # training views that are shown of a video
LISTED = 200  # missing videos that the page names


@dataclass(frozen=True)
class Suspect:
    """A video whose label may be wrong: another class was predicted with this probability."""

    record: VideoRecord
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Contents:
    """What the page shows.

    Attributes:
        title: the data set and its split.
        classes: class names in label order.
        records: all videos of the split that are there.
        missing: paths of those that are not.
        shown: those with a preview, for each class that has any.
        suspects: videos whose labels may be wrong, the most probable first; None if no predictions were given.
        training: how training makes views, to show some of each class; None to show none.
    """

    title: str
    classes: Sequence[str]
    records: Sequence[VideoRecord]
    missing: Sequence[str] = ()
    shown: Mapping[int, Sequence[VideoRecord]] = field(default_factory=dict)
    suspects: Sequence[Suspect] | None = None
    training: Views | None = None

    @property
    def previews(self) -> int:
        """How many there are to be made."""
        of_training = len(self.shown) * VIEWS if self.training is not None else 0
        return sum(map(len, self.shown.values())) + of_training + len(self.suspects or ())


def choose(records: Sequence[VideoRecord], per_class: int, limit: int) -> dict[int, list[VideoRecord]]:
    """Videos of each class, spread over the list; classes take turns until there are `limit` in all."""
    members: dict[int, list[VideoRecord]] = {}
    for record in records:
        members.setdefault(record.label, []).append(record)
    chosen: dict[int, list[VideoRecord]] = {}
    for turn in range(per_class):
        for label in sorted(members):
            own = members[label]
            count = min(per_class, len(own))
            if turn < count and limit > 0:
                chosen.setdefault(label, []).append(own[turn * len(own) // count])
                limit -= 1
    return chosen


def check_folder(folder: Path) -> None:
    """Raise InputError if the page cannot go into this folder, because it holds something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder with --out")
    if any(folder.iterdir()) and not (folder / MARK).is_file():
        raise InputError(f"{folder} is not empty, and not from rubiks browse; choose another folder with --out")


def write(
    folder: Path,
    contents: Contents,
    reader: str,
    seed: int,
    processes: int,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
) -> Path:
    """Make the previews, then write the page. What an earlier call has written is removed before.

    Args:
        folder: for the page, new, empty or ours.
        contents: what to show.
        reader: the library that reads video files, one of `readers.Reader`.
        seed: of training; its first epochs show the views that the page shows.
        processes: previews that are made at once.
        seconds: the time limit of one.
        advance: called for each preview that is done.

    Returns:
        The page.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    check_folder(folder)
    _clear(folder)
    jobs: list[Job] = []

    def job(record: VideoRecord, views: Views, epoch: int = 0) -> Job:
        place = (seed, epoch, positions[record], 0)
        jobs.append(Job(record, views, place, reader, folder / FOLDER / f"{len(jobs) + 1:05}.webp"))
        return jobs[-1]

    positions = {record: place for place, record in enumerate(contents.records)}
    shown = {label: [job(record, Spread()) for record in own] for label, own in contents.shown.items()}
    suspects = [(own, job(own.record, Spread())) for own in contents.suspects or ()]
    training: dict[int, list[Job]] = {}
    if contents.training is not None:
        views = contents.training
        training = {
            label: [job(own[0], views, epoch) for epoch in range(VIEWS)] for label, own in contents.shown.items()
        }
    made = make(jobs, processes, seconds, advance)

    counts = [0] * len(contents.classes)
    for record in contents.records:
        counts[record.label] += 1
    context = {
        "contents": contents,
        "counts": counts,
        "shown": shown,
        "suspects": suspects,
        "training": training,
        "made": made,
        "place": lambda own: f"{FOLDER}/{own.out.name}",
        "problems": _problems(jobs, made),
        "missing": contents.missing[:LISTED],
    }
    page.write(folder / PAGE, "browse.html", ["browse.js"], ["browse.css"], **context)
    return folder / PAGE


def _problems(jobs: Sequence[Job], made: Mapping[Path, int | VideoError]) -> dict[str, str]:
    """Why videos cannot be read, by name."""
    found = {}
    for own in jobs:
        result = made[own.out]
        if isinstance(result, VideoError):
            found[own.record.name] = result.reason
    return found


def _clear(folder: Path) -> None:
    """Make the folder ours, and empty."""
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
        (folder / PAGE).unlink(missing_ok=True)  # first: there is no page without its previews
        for file in (folder / FOLDER).glob("*.webp"):
            file.unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
