"""The base classes of sources of videos, and checks of their lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rubiks.data.records import VideoRecord
from rubiks.data.sources.annotations import AnnotationFile
from rubiks.errors import InputError
from rubiks.settings import Expected, Name, Settings

Split = Literal["train", "val"]


FirstFrame = Annotated[
    int,
    Field(ge=0, le=1, description="number of a folder's first frame, 1 or 0"),
    Expected("0 or 1, the number of a folder's first frame"),
]

OfficialSplit = Annotated[int, Field(ge=1, le=3, description="which of the three official splits")]


class Source(Settings, section="data"):
    """A data set: its configuration keys, its lists and its classes. Lists are read when they are needed."""

    missing_is_normal: ClassVar[bool] = False  # whether listed videos may be missing

    format: str
    name: str = Field("", description="part of the run's name; ckpt=latest only considers runs on data of this name")
    root: Name = Field(description="folder of the data set")
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="number of classes; required if no file names them"
    )
    manifest: Name = Field(
        "rubiks-manifest.jsonl",
        description="the file that `rubiks check` wrote, absolute or relative to data.root; optional",
    )

    @property
    def classes(self) -> list[str] | None:
        """Class names in label order; None if the data set does not give them, and data.num_classes is needed."""
        raise NotImplementedError

    @property
    def classes_path(self) -> str:
        """The file or folder that names the classes."""
        raise NotImplementedError

    def ready(self) -> Source:
        """The source with its files in place; the built-in data set is made here."""
        return self

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        """The videos of a split that exist, in the list's order, and the paths of those that do not."""
        raise NotImplementedError


class ListedSource(Source):
    """A data set whose classes and videos are in a labels file and two lists.

    A file that is not given is looked for under its official names in root and in `subfolder`.
    """

    subfolder: ClassVar[str] = ""  # of root, where official files may be

    train_list: Name | None = Field(
        None,
        description="the training list, absolute or relative to root or the working directory; null: its official name",
    )
    val_list: Name | None = Field(None, description="the same for validation")
    labels: Name | None = Field(None, description="the same for the file that names the classes")

    def official_names(self, what: Literal["labels", "train", "val"]) -> Sequence[str]:
        """The names under which a file is looked for; none for data sets without official files."""
        return ()

    @cached_property
    def _labels(self) -> AnnotationFile:
        return self._file("labels", self.labels, "labels")

    @cached_property
    def _lists(self) -> Mapping[Split, AnnotationFile]:
        return {
            "train": self._file("train_list", self.train_list, "train"),
            "val": self._file("val_list", self.val_list, "val"),
        }

    def _file(self, key: str, given: str | None, what: Literal["labels", "train", "val"]) -> AnnotationFile:
        return AnnotationFile(self.root, given, self.key(key), self.official_names(what), self.subfolder)

    @property
    def classes_path(self) -> str:
        return self._class_file.path

    @property
    def _class_file(self) -> AnnotationFile:
        """The file that gives the classes."""
        return self._labels

    def has(self, split: Split) -> bool:
        """Whether the split has a list: one that the configuration names, whether or not it exists, or a file with an
        official name."""
        return self._lists[split].given is not None or self._lists[split].exists()

    @property
    def _naming_list(self) -> AnnotationFile:
        """The list that gives the classes if no labels file does: the training list, or else the validation list."""
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
        By split: the videos that exist, the paths of those that do not, and the reason why a split has no list.

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
    """Raise InputError if labels are not in range(num_classes).

    Args:
        records: the records of one list.
        num_classes: how many classes there are, known from elsewhere than the list.
        list_name: how the message names the list, for example its path or key.
    """
    if (wrong := describe_wrong_labels(list(records), num_classes)) is not None:
        raise InputError(f"{list_name}: {wrong}")


def describe_wrong_labels(records: Sequence[VideoRecord], num_classes: int) -> str | None:
    """How many labels of a list are not in range(num_classes), the first, and what to do; None if all are."""
    outside = [record for record in records if not 0 <= record.label < num_classes]
    if not outside:
        return None
    remedy = _from_one([record.label for record in records], num_classes)
    return (
        f"{len(outside):,} of {len(records):,} labels are not in 0 to {num_classes - 1}; the first is label "
        f"{outside[0].label} of {outside[0].path}; {remedy or 'correct the list or set data.num_classes'}"
    )


def check_numbers(numbers: Sequence[tuple[str, int]], classes: Sequence[str] | None, labels: AnnotationFile) -> None:
    """Raise InputError for the first label of a list that is below 0 or beyond the classes.

    Args:
        numbers: each label's place in the file, and the label.
        classes: the class names of the labels file; None if there is none.
        labels: the labels file.
    """
    for where, label in numbers:
        if label < 0:
            raise InputError(f"{where}: expected a label from 0 up, got {label}; correct it")
        if classes is not None and label >= len(classes):
            remedy = _from_one([label for _, label in numbers], len(classes))
            raise InputError(
                f"{where}: expected a label from 0 to {len(classes) - 1} for the {len(classes)} classes in "
                f"{labels.path}, got {label}; {remedy or f'correct it or set {labels.key}'}"
            )


def _from_one(labels: Sequence[int], num_classes: int) -> str | None:
    """What to do about a list whose labels start at 1; None for other lists."""
    if labels and min(labels) == 1 and max(labels) == num_classes:
        return "labels seem to start at 1, but they must start at 0: subtract 1 from each label, in all lists"
    return None
