"""Reading annotation files, and what can be wrong with them: one InputError with the file, the line and what to set."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

from rubiks.data.records import VideoRecord
from rubiks.errors import InputError


class AnnotationFile:
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

    def numbered_lines(self) -> Iterator[tuple[str, str]]:
        """Where a line stands, and the line; blank ones are left out."""
        for number, line in enumerate(self.lines(), start=1):
            if line.strip():
                yield f"{self.path}, line {number}", line

    def class_names(self) -> list[str]:
        """One class name a line; blank lines do not count."""
        names = [line.strip() for line in self.lines() if line.strip()]
        if not names:
            raise InputError(f"{self.path}: holds no class names, expected one a line; set {self.key}")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"{self.path}: names the class {shown(twice)} more than once; correct it or set {self.key}"
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
            raise lists_no_videos(self)


class Folders:
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

    def first(self, stem: str, extensions: Sequence[str]) -> str:
        """The first of the stem with each extension that exists; where none does, with the first extension."""
        return next((stem + end for end in extensions if self.have(stem + end)), stem + extensions[0])

    def video(self, path: str) -> str:
        """The path, or that of the .mp4 that `rubiks prepare` has written in its place."""
        stem, extension = os.path.splitext(path)
        return self.first(stem, (extension, ".mp4"))


def split_by_presence(records: Iterable[VideoRecord]) -> tuple[list[VideoRecord], list[str]]:
    """The records whose path exists, and the paths of the others."""
    folders = Folders()
    present: list[VideoRecord] = []
    missing: list[str] = []
    for record in records:
        if folders.have(record.path):
            present.append(record)
        else:
            missing.append(record.path)
    return present, missing


_Item = TypeVar("_Item")


def not_empty(items: list[_Item], file: AnnotationFile) -> list[_Item]:
    if not items:
        raise lists_no_videos(file)
    return items


def lists_no_videos(file: AnnotationFile) -> InputError:
    return InputError(f"{file.path}: lists no videos; set {file.key} to another list")


def unknown_class(where: str, label: str, classes: AnnotationFile) -> InputError:
    return InputError(
        f"{where}: the class {shown(label)} is not in {classes.path}, which gives the classes; correct the label, "
        "or set data.labels to a file with all class names"
    )


def check_number(label: int, classes: Sequence[str] | None, where: str, labels: AnnotationFile) -> None:
    if label < 0:
        raise InputError(f"{where}: expected a label from 0, got {label}; correct it")
    if classes is not None and label >= len(classes):
        raise InputError(
            f"{where}: expected a label from 0 to {len(classes) - 1} for the {len(classes)} classes in {labels.path}, "
            f"got {label}; correct it or set {labels.key}"
        )


def file_name(text: str, where: str, field: str) -> str:
    """The text, unless it would lead to another folder."""
    if not text or re.search(r"[/\\\0]", text) or text in (".", ".."):
        raise InputError(f"{where}: expected {field} to be the name of a file, got {shown(text)}; correct it")
    return text


def integer(text: str) -> int | None:
    """The whole number that the text is; None where it is none, or one beyond any count or label."""
    return int(text) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) else None


def shown(value: object) -> str:
    """A value for an error message, at most a line long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
