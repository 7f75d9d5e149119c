"""Check that every video of a data set is what its lists and its container promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rubiks.data.examine import examine
from rubiks.data.manifest import Entry, Manifest, stamp
from rubiks.data.records import VideoRecord
from rubiks.data.sources import Split
from rubiks.data.workers import LostWorkerError, work
from rubiks.errors import VideoError


def check(
    records: Sequence[VideoRecord],
    manifest: Manifest,
    processes: int,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
    whole: bool = True,
) -> None:
    """Examine the records that are new or have changed since the manifest, and add each to it when it is done.

    Args:
        records: the videos; repeats count once.
        manifest: holds the known entries and receives the new ones.
        processes: how many videos are read at once.
        seconds: the time limit of one video.
        advance: called for every video.
        whole: whether the records are the whole data set; entries of other videos are then removed.
    """
    by_name = {manifest.name_of(record.path): record for record in records}
    manifest.write(manifest.entries)  # drops what an interrupted check left half-written
    todo = []
    for name, record in by_name.items():
        entry = manifest.entries.get(name)
        if entry is not None and (entry.size, entry.mtime_ns) == stamp(record):
            advance()
        else:
            todo.append((record, name))
    for (record, name), found in work(_examine, todo, lambda item: item[0].path, processes, seconds):
        if isinstance(found, VideoError):
            # A lost one may be good with more time or memory: this time stamp makes the next check read it again.
            size, mtime_ns = stamp(record)
            lost = isinstance(found, LostWorkerError)
            found = Entry(name, size, -1 if lost else mtime_ns, problem=found.reason)
        manifest.append(found)
        advance()
    manifest.write(by_name if whole else manifest.entries)


def _examine(item: tuple[VideoRecord, str]) -> Entry:
    return examine(*item)


# ---- the data set as a whole


def repeated(lists: Mapping[Split, Sequence[VideoRecord]], manifest: Manifest) -> list[list[tuple[Split, str]]]:
    """Groups of (split, path) with the same content, including a file that a list names twice."""
    groups: dict[str, list[tuple[Split, str]]] = {}
    for split, records in lists.items():
        for record in records:
            entry = manifest.entries.get(manifest.name_of(record.path))
            if entry is not None and entry.sha256:
                groups.setdefault(entry.sha256, []).append((split, record.path))
    return [group for group in groups.values() if len(group) > 1]


# Videos in the official lists, by the data set's name and its number of classes. Kinetics-400: the csv files of CVDF's
# copy; those of 600 and 700 have been released in several versions, so they are left out. The test lists of UCF101 and
# HMDB51 are the validation lists here.
_OFFICIAL: dict[tuple[str, int | None], dict[str, int]] = {
    ("ssv1", 174): {"train": 86_017, "val": 11_522, "test": 10_960},
    ("ssv2", 174): {"train": 168_913, "val": 24_777, "test": 27_157},
    ("jester", 27): {"train": 118_562, "val": 14_787, "test": 14_743},
    ("kinetics", 400): {"train": 246_534, "val": 19_906},
    ("ucf101-split1", 101): {"train": 9_537, "val": 3_783},
    ("ucf101-split2", 101): {"train": 9_586, "val": 3_734},
    ("ucf101-split3", 101): {"train": 9_624, "val": 3_696},
    **{(f"hmdb51-split{split}", 51): {"train": 3_570, "val": 1_530} for split in (1, 2, 3)},
}


def official_total(name: str, num_classes: int | None, split: str) -> int | None:
    """How many videos the official list of a split has; None if unknown.

    Args:
        name: the setting data.name.
        num_classes: how many classes it has; a part of a data set, or another edition, has a different number.
        split: train, val or test.
    """
    return _OFFICIAL.get((name, num_classes), {}).get(split)
