"""Where videos, labels and class names come from: the annotation files of the supported data sets.

A source reads a list only when it is asked for that split's records, or needs the list to know the classes. Whatever
is wrong with a file is one InputError that names the file, the line or entry, and the configuration key to set.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

from rubiks.data.records import VideoRecord
from rubiks.errors import InputError

Split = Literal["train", "val"]


class Source(Protocol):
    """A data set's lists and classes."""

    @property
    def classes(self) -> list[str] | None:
        """Class names in label order; None where the data set does not say, and the caller must supply a count."""

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        """The videos of a split that exist, in the list's order, and the paths of those that do not."""


class SomethingSomethingV2:
    """Something-Something v2: JSON annotations and `<root>/<videos>/<id>.webm`, or .mp4 as `rubiks prepare` writes.

    The official labels file maps each template without brackets to its number, {"Approaching something with your
    camera": "0", ...}; the lists are arrays of {"id": "78687", "template": "Approaching [something] with your camera",
    ...}. Files that are not given are looked for in root and root/labels under the names of both releases, such as
    something-something-v2-train.json and train.json.

    Args:
        root: folder of the data set.
        train_list: JSON list, absolute or relative to root or to the working directory; None for the official name.
        val_list: the same for validation.
        labels: the same for the labels file.
        videos: folder of the videos, relative to root.
    """

    def __init__(
        self,
        root: str,
        train_list: str | None = None,
        val_list: str | None = None,
        labels: str | None = None,
        videos: str = "20bn-something-something-v2",
    ) -> None:
        prefix = "something-something-v2-"
        self._labels = _File(root, labels, "data.labels", (f"{prefix}labels.json", "labels.json"), "labels")
        self._lists = {
            "train": _File(root, train_list, "data.train_list", (f"{prefix}train.json", "train.json"), "labels"),
            "val": _File(root, val_list, "data.val_list", (f"{prefix}validation.json", "validation.json"), "labels"),
        }
        self._videos = os.path.join(root, videos)

    @cached_property
    def classes(self) -> list[str]:
        templates = self._labels.json()
        if not isinstance(templates, dict) or not templates:
            raise InputError(
                f"{self._labels.path}: expected a JSON object of templates and their numbers, got {_shown(templates)}; "
                "set data.labels to the official labels file"
            )
        names: dict[int, str] = {}
        for template, number in templates.items():
            label = _integer(str(number))
            if label is None or label not in range(len(templates)) or label in names:
                raise InputError(
                    f"{self._labels.path}, {template!r}: expected a number of its own from 0 to {len(templates) - 1}, "
                    f"got {_shown(number)}; set data.labels to the official labels file"
                )
            names[label] = template
        return [names[label] for label in range(len(names))]

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        entries = file.json()
        if not isinstance(entries, list):
            raise InputError(f"{file.path}: expected a JSON array of videos, got {_shown(entries)}; set {file.key}")
        labels = {name: label for label, name in enumerate(self.classes)}
        records = []
        folders = _Folders()
        for number, entry in enumerate(entries, start=1):
            where = f"{file.path}, entry {number}"
            video, template = self._fields(entry, where, file.key)
            name = template.replace("[", "").replace("]", "")
            if name not in labels:
                raise InputError(
                    f"{where}: the template {_shown(template)} is not in the labels file {self._labels.path}; "
                    f"set data.labels and {file.key} to files of the same release"
                )
            stem = os.path.join(self._videos, _file_name(video, where, "id"))
            path = next((stem + end for end in (".webm", ".mp4") if folders.have(stem + end)), f"{stem}.webm")
            records.append(VideoRecord(path, labels[name]))
        return _split_by_presence(_not_empty(records, file))

    @staticmethod
    def _fields(entry: Any, where: str, key: str) -> tuple[str, str]:
        """The id and the template of a list's entry."""
        video, template = (entry.get("id"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(video, str) or not isinstance(template, str):
            raise InputError(
                f'{where}: expected an object with the strings "id" and "template", got {_shown(entry)}; '
                f"set {key} to an official list with labels (the test list has none)"
            )
        return video, template


class Kinetics:
    """Kinetics-400, 600 or 700: csv annotations and clips named `<youtube_id>_<start>_<end>.mp4`.

    The csv files have a header with the columns label, youtube_id, time_start, time_end (whole seconds, six digits in
    the file name) and any others. Files that are not given are looked for in root and root/annotations as train.csv,
    and val.csv or validate.csv. Clips lie in root/<split> or root, or below either in a folder per class, named with
    spaces or underscores. Clips that are gone from YouTube are normal and come back as missing.

    Args:
        root: folder of the data set.
        train_list: csv file, absolute or relative to root or to the working directory; None for the official name.
        val_list: the same for validation.
        labels: text file with one class name a line, in label order. None: the sorted labels of the training csv,
            or of the validation csv where there is no training csv.
    """

    def __init__(
        self, root: str, train_list: str | None = None, val_list: str | None = None, labels: str | None = None
    ) -> None:
        self._root = root
        self._labels = _File(root, labels, "data.labels")
        self._lists = {
            "train": _File(root, train_list, "data.train_list", ("train.csv",), "annotations"),
            "val": _File(root, val_list, "data.val_list", ("val.csv", "validate.csv"), "annotations"),
        }

    @cached_property
    def classes(self) -> list[str]:
        file = self._class_file
        return file.class_names() if file is self._labels else sorted({label for _, label, _ in self._clips(file)})

    @property
    def _class_file(self) -> _File:
        """The file that gives the classes."""
        if self._labels.given is not None:
            return self._labels
        train = self._lists["train"]
        return train if train.given is not None or train.exists() else self._lists["val"]

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        labels = {name: label for label, name in enumerate(self.classes)}
        tops = (os.path.join(self._root, split), self._root)
        folders = _Folders()
        records, missing = [], []
        for where, label, stem in self._clips(file):
            if label not in labels:
                raise _unknown_class(where, label, self._class_file)
            places = [os.path.join(top, name) for top in tops for name in ("", label, label.replace(" ", "_"))]
            paths = [
                os.path.join(place, stem + extension) for place in places for extension in (".mp4", ".mkv", ".webm")
            ]
            found = next((path for path in paths if folders.have(path)), None)
            if found is None:
                missing.append(paths[0])
            else:
                records.append(VideoRecord(found, labels[label]))
        if not records:
            raise InputError(
                f"{file.path}: none of its {len(missing)} videos was found; looked for {os.path.basename(missing[0])} "
                f"and the others in {tops[0]}, in {tops[1]} and in the folders per class in them; "
                "set data.root to the folder that holds the videos"
            )
        return records, missing

    @staticmethod
    def _clips(file: _File) -> Iterator[tuple[str, str, str]]:
        """Per row: where it stands, the label, and the clip's file name without extension."""
        columns = ("label", "youtube_id", "time_start", "time_end")
        rows = file.csv_rows()
        where, header = next(rows)
        if not set(columns) <= set(header):
            raise InputError(
                f"{where}: expected a header with the columns {', '.join(columns)}, got {_shown(', '.join(header))}; "
                f"set {file.key} to an official csv file with labels (the test list has none)"
            )
        positions = [header.index(column) for column in columns]
        empty = True
        for where, row in rows:
            if len(row) != len(header):
                raise InputError(f"{where}: expected {len(header)} columns like the header, got {len(row)}; correct it")
            label, video, *times = (row[position] for position in positions)
            start, end = (_integer(time) for time in times)
            if start is None or end is None or start < 0 or end < 0:
                raise InputError(
                    f"{where}: expected time_start and time_end in whole seconds, "
                    f"got {_shown(times[0])} and {_shown(times[1])}; correct it"
                )
            empty = False
            yield where, label, f"{_file_name(video, where, 'youtube_id')}_{start:06d}_{end:06d}"
        if empty:
            raise _lists_no_videos(file)


class FrameLists:
    """Folders of frames in the lists of TSM and TSN: one `folder num_frames label` a line, separated by spaces.

    A folder's name may contain spaces: a line is split from the right. Labels are numbers from 0. A count below 1 is
    left to the reader, which names the one folder.

    Args:
        root: folder to which the lists' folders are relative.
        train_list: text file, absolute or relative to root or to the working directory; None where not needed.
        val_list: the same for validation.
        labels: text file with one class name a line, in label order; None where there is none.
        pattern: format of the frames' file names, which are numbered from 1.
    """

    def __init__(
        self,
        root: str,
        train_list: str | None = None,
        val_list: str | None = None,
        labels: str | None = None,
        pattern: str = "{:05d}.jpg",
    ) -> None:
        self._root = root
        self._labels = _File(root, labels, "data.labels")
        self._lists = {
            "train": _File(root, train_list, "data.train_list"),
            "val": _File(root, val_list, "data.val_list"),
        }
        self._pattern = _checked_pattern(pattern)

    @cached_property
    def classes(self) -> list[str] | None:
        return None if self._labels.given is None else self._labels.class_names()

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        records = []
        for number, line in enumerate(file.lines(), start=1):
            if not line.strip():
                continue
            where = f"{file.path}, line {number}"
            fields = line.rsplit(maxsplit=2)
            count, label = (_integer(field) for field in fields[1:]) if len(fields) == 3 else (None, None)
            if count is None or label is None:
                raise InputError(
                    f"{where}: expected `folder num_frames label`, the last two whole numbers, got {_shown(line)}; "
                    f"set {file.key} to a list of frame folders or correct the line"
                )
            _check_number(label, self.classes, where, self._labels)
            records.append(VideoRecord(os.path.join(self._root, fields[0].lstrip()), label, count, self._pattern))
        return _split_by_presence(_not_empty(records, file))


class CsvLists:
    """Videos in csv files with a row `path,label` each and an optional header `path,label`.

    A label is a number from 0 or a class name. With a labels file, a label that is one of its lines is that name, and
    any other must be a number. Without one, the training list decides (the validation list where no training list is
    given): if all its labels are numbers, so must those of the other list be, and the names of the classes are not
    known; otherwise all are names, also those that look like numbers, and their sorted order gives the labels.

    Args:
        root: folder to which the lists' paths are relative; absolute paths stay as they are.
        train_list: csv file, absolute or relative to root or to the working directory; None where there is none.
        val_list: the same for validation.
        labels: text file with one class name a line, in label order; None where there is none.
    """

    def __init__(
        self, root: str, train_list: str | None = None, val_list: str | None = None, labels: str | None = None
    ) -> None:
        self._root = root
        self._labels = _File(root, labels, "data.labels")
        self._lists = {
            "train": _File(root, train_list, "data.train_list"),
            "val": _File(root, val_list, "data.val_list"),
        }

    @cached_property
    def classes(self) -> list[str] | None:
        file = self._class_file
        if file is self._labels:
            return file.class_names()
        names = {label for _, _, label in self._rows(file)}
        return None if all(_integer(name) is not None for name in names) else sorted(names)

    @property
    def _class_file(self) -> _File:
        """The file that gives the classes."""
        if self._labels.given is not None:
            return self._labels
        return self._lists["train" if self._lists["train"].given is not None else "val"]

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        labels = {name: label for label, name in enumerate(self.classes or ())}
        numbers = self.classes is None or self._class_file is self._labels
        records = []
        for where, path, text in self._rows(self._lists[split]):
            label = labels.get(text)
            if label is None:
                label = _integer(text) if numbers else None
                if label is None:
                    raise self._unknown(where, text)
                _check_number(label, self.classes, where, self._labels)
            records.append(VideoRecord(os.path.join(self._root, path), label))
        return _split_by_presence(records)

    def rows(self, split: Split) -> list[tuple[str, str]]:
        """Path and label as the list has them."""
        return [(path, label) for _, path, label in self._rows(self._lists[split])]

    def _unknown(self, where: str, label: str) -> InputError:
        if self.classes is None:
            return InputError(
                f"{where}: expected a number like the labels in {self._class_file.path}, got {_shown(label)}; "
                "correct it, or set data.labels to a file with all class names"
            )
        return _unknown_class(where, label, self._class_file)

    @staticmethod
    def _rows(file: _File) -> list[tuple[str, str, str]]:
        """Per video: where it stands, its path and its label."""
        videos = []
        for index, (where, row) in enumerate(file.csv_rows()):
            if index == 0 and [column.strip().lower() for column in row] == ["path", "label"]:
                continue
            if len(row) != 2 or not all(column.strip() for column in row):
                raise InputError(
                    f"{where}: expected two columns `path,label` (a comma within quotes), got {_shown(','.join(row))}; "
                    f"set {file.key} to such a csv file or correct the row"
                )
            videos.append((where, row[0], row[1].strip()))
        return _not_empty(videos, file)


def annotation_files(source: Source) -> dict[str, str]:
    """The paths of a source's labels and lists, by configuration key; without those that do not exist."""
    assert isinstance(source, (SomethingSomethingV2, Kinetics, FrameLists, CsvLists))
    files = (source._labels, *source._lists.values())
    return {file.key: file.path for file in files if file.exists()}


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


class _File:
    """An annotation file: the one that a configuration key names, or the first that has an official name.

    Args:
        root: folder of the data set.
        given: the key's value, absolute or relative to root or to the working directory.
        key: the configuration key.
        official: file names to look for where the key is not set.
        subfolder: folder in root, next to root itself, to look for them.
    """

    def __init__(
        self, root: str, given: str | None, key: str, official: Sequence[str] = (), subfolder: str = ""
    ) -> None:
        self.given = given
        self.key = key
        self._root = root
        if given is not None:
            self._candidates = [os.path.join(root, given), given]
        else:
            self._candidates = [os.path.join(root, folder, name) for folder in ("", subfolder) for name in official]

    def exists(self) -> bool:
        return any(os.path.isfile(path) for path in self._candidates)

    @cached_property
    def path(self) -> str:
        """The path found, or an InputError that says what to set."""
        if not os.path.isdir(self._root):
            raise InputError(f"{self._root}: no such folder; set data.root to the data set's folder")
        if not self._candidates:
            raise InputError(f"{self.key} is not set; set it to the file's path, absolute or relative to data.root")
        found = next((path for path in self._candidates if os.path.isfile(path)), None)
        if found is None:
            looked = ", ".join(dict.fromkeys(self._candidates))
            raise InputError(f"No file for {self.key}; looked for {looked}; set {self.key} to its path")
        return found

    def text(self) -> str:
        try:
            with open(self.path, "rb") as file:
                text = file.read().decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}; check {self.key}") from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}: expected text in UTF-8, got byte {error.object[error.start]:#x} at {error.start}; "
                f"set {self.key} to a text file or convert this one"
            ) from error
        if "\0" in text:
            raise InputError(f"{self.path}: expected text, got a binary file; set {self.key} to a text file")
        return text

    def lines(self) -> list[str]:
        # Not str.splitlines, which also splits at characters that may be part of a name.
        return re.split(r"\r\n|\r|\n", self.text())

    def class_names(self) -> list[str]:
        """One class name a line; blank lines do not count."""
        names = [line.strip() for line in self.lines() if line.strip()]
        if not names:
            raise InputError(f"{self.path}: holds no class names, expected one a line; set {self.key}")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"{self.path}: names the class {_shown(twice)} more than once; correct it or set {self.key}"
            )
        return names

    def json(self) -> Any:
        text = self.text()
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{self.path}: expected JSON, got an error: {error}; set {self.key} to a JSON file"
            ) from error

    def csv_rows(self) -> Iterator[tuple[str, list[str]]]:
        """Where a row stands, and its columns; at least one row, none of them blank."""
        reader = csv.reader(io.StringIO(self.text(), newline=""), strict=True)
        empty = True
        try:
            for row in reader:
                if any(row):
                    empty = False
                    yield f"{self.path}, line {reader.line_num}", row
        except csv.Error as error:
            where = f"{self.path}, line {reader.line_num}"
            raise InputError(f"{where}: not readable as csv: {error}; correct it or set {self.key}") from error
        if empty:
            raise _lists_no_videos(self)


class _Folders:
    """Whether paths exist, by listing each parent folder once: on network disks far faster than asking for each."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def have(self, path: str) -> bool:
        folder, name = os.path.split(os.path.normpath(path))
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder or "."))
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
            except OSError as error:
                raise InputError(f"{folder}: cannot be listed: {error.strerror}; check data.root") from error
        return name in self._names[folder]


def _split_by_presence(records: Iterable[VideoRecord]) -> tuple[list[VideoRecord], list[str]]:
    """The records whose path exists, and the paths of the others."""
    folders = _Folders()
    present: list[VideoRecord] = []
    missing: list[str] = []
    for record in records:
        if folders.have(record.path):
            present.append(record)
        else:
            missing.append(record.path)
    return present, missing


_Item = TypeVar("_Item")


def _not_empty(items: list[_Item], file: _File) -> list[_Item]:
    if not items:
        raise _lists_no_videos(file)
    return items


def _lists_no_videos(file: _File) -> InputError:
    return InputError(f"{file.path}: lists no videos; set {file.key} to another list")


def _unknown_class(where: str, label: str, classes: _File) -> InputError:
    return InputError(
        f"{where}: the class {_shown(label)} is not in {classes.path}, which gives the classes; correct the label, "
        "or set data.labels to a file with all class names"
    )


def _check_number(label: int, classes: Sequence[str] | None, where: str, labels: _File) -> None:
    if label < 0:
        raise InputError(f"{where}: expected a label from 0, got {label}; correct it")
    if classes is not None and label >= len(classes):
        raise InputError(
            f"{where}: expected a label from 0 to {len(classes) - 1} for the {len(classes)} classes in {labels.path}, "
            f"got {label}; correct it or set {labels.key}"
        )


def _checked_pattern(pattern: str) -> str:
    try:
        names = [pattern.format(number) for number in (1, 2)]
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        names = [str(error)] * 2
    if names[0] == names[1] or os.path.basename(names[0]) != names[0]:
        raise InputError(
            f"data.pattern: expected a format of a number to a file name, such as {{:05d}}.jpg, got {_shown(pattern)}"
        )
    return pattern


def _file_name(text: str, where: str, field: str) -> str:
    """The text, unless it would lead to another folder."""
    if not text or re.search(r"[/\\\0]", text) or text in (".", ".."):
        raise InputError(f"{where}: expected {field} to be the name of a file, got {_shown(text)}; correct it")
    return text


def _integer(text: str) -> int | None:
    """The whole number that the text is; None where it is none, or one beyond any count or label."""
    return int(text) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) else None


def _shown(value: object) -> str:
    """A value for an error message, at most a line long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
