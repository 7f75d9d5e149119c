"""The classes and videos of a data set, for training or evaluation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from rubiks.data.datamodule import Loading
from rubiks.data.flip import mirrored_labels, tells
from rubiks.data.manifest import Manifest
from rubiks.data.records import VideoRecord
from rubiks.data.sources import Source, Split, check_labels
from rubiks.errors import InputError

log = logging.getLogger(__name__)


def check_class_count(source: Source) -> None:
    """Raise InputError if the data set names its classes and their number is not data.num_classes."""
    names, count = source.classes, source.num_classes
    if count is not None and names is not None and len(names) != count:
        raise InputError(
            f"{source.classes_path}: expected data.num_classes={count} classes, got {len(names)}; use the official "
            f"files of data={source.format}, or set data.num_classes={len(names)} for a subset or another edition"
        )


def class_names(source: Source, names: Sequence[str] | None = None, count: int | None = None) -> list[str]:
    """Class names in label order: the data set's, or the class numbers if it has no names.

    Args:
        source: the data set.
        names: class names for a data set that neither names nor counts its classes; None if unknown.
        count: the number of classes for such a data set; None if unknown.
    """
    check_class_count(source)
    if source.classes is not None or source.num_classes is not None:
        names, count = source.classes, source.num_classes
    if names is not None:
        return list(names)
    if count is None:
        raise InputError(
            f"data={source.format} does not name its classes: set data.num_classes=, or data.labels= to a text file "
            "with one class per line"
        )
    return [str(label) for label in range(count)]


def manifest_of(source: Source) -> Manifest:
    """The manifest that `rubiks check` or `rubiks prepare` wrote with the videos; empty if neither has run."""
    found = Manifest(source.root, source.manifest)
    if found.outdated:
        log.warning(
            "%s: %s entries are from another version and are ignored until rubiks check has read their videos again",
            found.path,
            found.outdated,
        )
    return found


def records(
    source: Source, loading: Loading, split: Split, num_classes: int, checked: Manifest
) -> tuple[list[VideoRecord], list[str]]:
    """The present videos of a split, and the paths of the missing ones; InputError if more are missing than allowed."""
    present, missing = source.records(split)
    check_labels(present, num_classes, getattr(source, f"{split}_list", None) or f"the {split} list")
    total = len(present) + len(missing)
    if missing:
        message = f"{len(missing):,} of the {total:,} {split} videos are missing; the first is {missing[0]}"
        if not source.missing_is_normal and loading.on_error == "raise":
            raise InputError(f"{message}. data.on_error=skip skips them and counts them")
        if not present or (not source.missing_is_normal and len(missing) > loading.max_bad * total):
            raise InputError(
                f"{message}. That is more than data.max_bad={loading.max_bad:g} of the list; check data.root"
            )
        log.warning("%s", message)
    if checked.entries and not any(checked.name_of(record.path) in checked.entries for record in present):
        log.warning(
            "%s has no entries for the %s videos: it is of another data set, or rubiks check has not read them yet",
            checked.path,
            split,
        )
    return checked.apply(present), missing


def digest(videos: Sequence[VideoRecord]) -> str:
    """SHA-256 of the names and labels of a list, in order."""
    total = hashlib.sha256()
    for video in videos:
        total.update(f"{video.name}\t{video.label}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def mirrored(choice: bool | str, classes: Sequence[str]) -> list[int] | None:
    """The class that a mirrored clip of each class shows; None if no clips are mirrored.

    Args:
        choice: the setting data.flip.
        classes: class names in label order.
    """
    if not choice:
        return None
    labels, alone = mirrored_labels(classes)
    silent = next((name for name in classes if not tells(name)), None)
    if choice == "auto" and (alone or silent):
        reason = f"class {alone[0]!r} has no mirror image" if alone else f"the class name {silent!r} contains no words"
        log.warning("data.flip=auto: clips are not mirrored, since %s; data.flip=true mirrors them anyway", reason)
        return None
    for label, other in enumerate(labels):
        if label < other:
            log.info("data.flip: mirroring swaps the classes %r and %r", classes[label], classes[other])
    return labels
