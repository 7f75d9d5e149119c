"""Reads annotation files; anything wrong gives one InputError with the file, the line and what to set."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

from rubiks.data.records import VideoRecord
from rubiks.errors import InputError


class AnnotationFile:
    """An annotation file: the one that a configuration key names, or the first one found under an official name.

    Args:
        root: folder of the data set.
        given: the key's value, absolute or relative to root or to the working directory.
        key: the configuration key.
        official: file names to look for if the key is not set.
        subfolder: folder in root to look in, besides root itself.
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
        self.check_root()
        found = next((path for path in self._candidates if os.path.isfile(path)), None)
        if found is None:
            raise InputError(self.absence())
        return found

    def check_root(self) -> None:
        if not os.path.isdir(self._root):
            raise InputError(f"{self._root}: no such folder; set data.root to the data set's folder")

    def absence(self) -> str:
        """The message for a missing file."""
        if not self._candidates:
            return f"{self.key} is not set; set it to the file's path, absolute or relative to data.root"
        looked = ", ".join(dict.fromkeys(self._candidates))
        return f"No file for {self.key}; looked for {looked}; set {self.key} to its path"

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
        """Each line's place in the file, and the line; blank ones are skipped."""
        for number, line in enumerate(self.lines(), start=1):
            if line.strip():
                yield f"{self.path}, line {number}", line

    def class_names(self) -> list[str]:
        """One class name per line, in NFC; blank lines are skipped."""
        names = [nfc(line.strip()) for line in self.lines() if line.strip()]
        if not names:
            raise InputError(f"{self.path}: contains no class names, expected one per line; set {self.key}")
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
        """Each row's place in the file, and its columns; at least one row. Rows of blank columns are skipped."""
        reader = csv.reader(io.StringIO(self.text(), newline=""), strict=True)
        empty = True
        try:
            for row in reader:
                if any(column.strip() for column in row):
                    empty = False
                    yield f"{self.path}, line {reader.line_num}", row
        except csv.Error as error:
            where = f"{self.path}, line {reader.line_num}"
            raise InputError(f"{where}: not readable as csv: {error}; correct it or set {self.key}") from error
        if empty:
            raise lists_no_videos(self)


class Folders:
    """Finds paths on the disk by listing each folder once: on network disks far faster than looking up each path.

    macOS writes an accented letter in a name as two characters (Unicode's form NFD), lists mostly as one (NFC). A path
    is found whichever form the list and the disk use.
    """

    def __init__(self) -> None:
        self._names: dict[str, dict[str, str] | None] = {}

    def find(self, path: str) -> str | None:
        """The path as spelled on the disk; None if it does not exist."""
        folder, name = os.path.split(os.path.normpath(path))
        real, names = folder, self._listed(folder)
        if names is None and not folder.isascii() and (other := self.find(folder)) is not None:
            real, names = other, self._listed(other)
        found = None if names is None else names.get(name) or names.get(nfc(name))
        if found is None:
            return None
        return path if (real, found) == (folder, name) else os.path.join(real, found)

    def first(self, paths: Sequence[str]) -> str | None:
        """The first of the paths that exists, as spelled on the disk; None if none does."""
        return next((found for path in paths if (found := self.find(path)) is not None), None)

    def video(self, path: str) -> str:
        """The path, or that of the .mp4 that `rubiks prepare` wrote to replace it."""
        return self.first((path, os.path.splitext(path)[0] + ".mp4")) or path

    def _listed(self, folder: str) -> dict[str, str] | None:
        """The names in a folder, found by the name itself and by its NFC; None if there is no such folder."""
        if folder not in self._names:
            try:
                names = os.listdir(folder or ".")
                self._names[folder] = {nfc(name): name for name in names} | {name: name for name in names}
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = None
            except OSError as error:
                raise InputError(f"{folder}: cannot be listed: {error.strerror}; check data.root") from error
        return self._names[folder]


def split_by_presence(
    records: Iterable[VideoRecord], folders: Folders | None = None
) -> tuple[list[VideoRecord], list[str]]:
    """The records whose path exists, with the path as spelled on the disk, and the paths of the others."""
    folders = folders or Folders()
    present: list[VideoRecord] = []
    missing: list[str] = []
    for record in records:
        found = folders.find(record.path)
        if found is None:
            missing.append(record.path)
        else:
            present.append(record if found == record.path else dataclasses.replace(record, path=found))
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
        f"{where}: the class {shown(label)} is not in {classes.path}, which names the classes; correct the label, "
        "or set data.labels to a file with all class names"
    )


def file_name(text: str, where: str, field: str) -> str:
    """The text; InputError if it would lead to another folder."""
    if not text or re.search(r"[/\\\0]", text) or text in (".", ".."):
        raise InputError(f"{where}: expected {field} to be the name of a file, got {shown(text)}; correct it")
    return text


def nfc(text: str) -> str:
    """The text in Unicode's form NFC, to compare names: names that look equal may differ in their characters."""
    return unicodedata.normalize("NFC", text)


def integer(text: str) -> int | None:
    """The text as a whole number; None if it is not one, or is too large for any count or label."""
    return int(text) if re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text) else None


def shown(value: object) -> str:
    """A value for an error message, at most a line long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
