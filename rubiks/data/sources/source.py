"""What a source of videos is, and what its annotation files have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from rubiks.data.records import VideoRecord
from rubiks.data.sources.annotations import AnnotationFile
from rubiks.errors import InputError

Split = Literal["train", "val"]


class Source(Protocol):
    """A data set's lists and classes."""

    @property
    def classes(self) -> list[str] | None:
        """Class names in label order; None where the data set does not say, and the caller must supply a count."""

    @property
    def classes_path(self) -> str:
        """The file or folder that names the classes."""

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        """The videos of a split that exist, in the list's order, and the paths of those that do not."""


class ListedSource:
    """What the sources have in common whose classes and videos are in a labels file and two lists.

    Args:
        labels: the labels file.
        train, val: the lists.
    """

    def __init__(self, labels: AnnotationFile, train: AnnotationFile, val: AnnotationFile) -> None:
        self._labels = labels
        self._lists: Mapping[Split, AnnotationFile] = {"train": train, "val": val}

    @property
    def classes_path(self) -> str:
        return self._class_file.path

    @property
    def _class_file(self) -> AnnotationFile:
        """The file that gives the classes."""
        return self._labels

    def has(self, split: Split) -> bool:
        """Whether there is a list of the split: one that the configuration names, right or wrong, or a file of an
        official name."""
        return self._lists[split].given is not None or self._lists[split].exists()

    @property
    def _naming_list(self) -> AnnotationFile:
        """The list that gives the classes where no labels file does: the training list, or else the validation list."""
        train, val = self._lists["train"], self._lists["val"]
        if self.has("train"):
            return train
        if self.has("val"):
            return val
        train.check_root()
        raise InputError(f"{train.absence()}. For evaluation alone a validation list is enough: {val.absence()}")

    def annotation_files(self) -> dict[str, str]:
        """The paths of labels and lists, by configuration key; without those that do not exist."""
        return {file.key: file.path for file in (self._labels, *self._lists.values()) if file.exists()}


def read_lists(
    source: Source,
) -> tuple[dict[Split, list[VideoRecord]], dict[Split, list[str]], dict[Split, str]]:
    """The lists that a source has.

    Returns:
        By split the videos that exist, the paths of those that do not, and of a split without a list the reason.

    Raises:
        InputError: a list is wrong, or there is none.
    """
    splits: tuple[Split, Split] = ("train", "val")
    lists, missing, absent = {}, {}, {}
    for split in splits:
        try:
            lists[split], missing[split] = source.records(split)
        except InputError as error:
            if isinstance(source, ListedSource) and source.has(split):
                raise
            absent[split] = str(error)
    if not lists:
        raise InputError(absent["train"])
    return lists, missing, absent


def check_labels(records: Iterable[VideoRecord], num_classes: int, list_name: str) -> None:
    """Raise InputError where labels are not in range(num_classes).

    Args:
        records: the records of one list.
        num_classes: how many classes there are, from outside of the data set.
        list_name: how the message names the list, for example its path or key.
    """
    if (wrong := describe_wrong_labels(list(records), num_classes)) is not None:
        raise InputError(f"{list_name}: {wrong}")


def describe_wrong_labels(records: Sequence[VideoRecord], num_classes: int) -> str | None:
    """How many labels of a list are not in range(num_classes), the first, and what to do; None where all are."""
    outside = [record for record in records if not 0 <= record.label < num_classes]
    if not outside:
        return None
    remedy = _from_one([record.label for record in records], num_classes)
    return (
        f"{len(outside):,} of {len(records):,} labels are not in 0 to {num_classes - 1}, the first is label "
        f"{outside[0].label} of {outside[0].path}; {remedy or 'correct the list or set data.num_classes'}"
    )


def check_numbers(numbers: Sequence[tuple[str, int]], classes: Sequence[str] | None, labels: AnnotationFile) -> None:
    """Raise InputError for the first label of a list, given with its place, that is below 0 or beyond the classes.

    Args:
        numbers: where each label stands, and the label.
        classes: what the labels file names; None where there is none.
        labels: the labels file.
    """
    for where, label in numbers:
        if label < 0:
            raise InputError(f"{where}: expected a label from 0, got {label}; correct it")
        if classes is not None and label >= len(classes):
            remedy = _from_one([label for _, label in numbers], len(classes))
            raise InputError(
                f"{where}: expected a label from 0 to {len(classes) - 1} for the {len(classes)} classes in "
                f"{labels.path}, got {label}; {remedy or f'correct it or set {labels.key}'}"
            )


def _from_one(labels: Sequence[int], num_classes: int) -> str | None:
    """What to do with the labels of a list that is numbered from 1; None for another."""
    if labels and min(labels) == 1 and max(labels) == num_classes:
        return "labels seem to start at 1; they must start at 0: subtract 1 from each label, in all lists"
    return None
