"""What a source of videos is, and what its annotation files have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Raise InputError for the first record whose label is not in range(num_classes).

    Args:
        records: the records of one list.
        num_classes: how many classes there are, from outside of the data set.
        list_name: how the message names the list, for example its path or key.
    """
    for record in records:
        if not 0 <= record.label < num_classes:
            raise InputError(
                f"{list_name}: {record.path} has the label {record.label}, expected 0 to {num_classes - 1} for "
                f"{num_classes} classes; correct the list or set data.num_classes"
            )
