"""Custom lists: folders of frames as TSM lists them, and csv files of any videos."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rubiks.data.records import VideoRecord
from rubiks.data.sources.annotations import (
    AnnotationFile,
    Folders,
    integer,
    nfc,
    not_empty,
    shown,
    split_by_presence,
    unknown_class,
)
from rubiks.data.sources.source import FirstFrame, ListedSource, Split, check_numbers
from rubiks.errors import InputError

_HEADERS = (["path", "label"], ["video", "label"])  # of csv files


def _checked_pattern(pattern: str) -> str:
    try:
        names = [pattern.format(number) for number in (1, 2)]
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        names = [str(error)] * 2
    if names[0] == names[1] or os.path.basename(names[0]) != names[0]:
        raise InputError(
            "data.pattern: expected a format string for a frame's file name, such as {:05d}.jpg, "
            f"got {shown(pattern)}"
        )
    return pattern


class FrameLists(ListedSource):
    """Folders of frames in the lists of TSM and TSN: one `folder num_frames label` per line, separated by spaces.

    A folder's name may contain spaces: a line is split from the right. Labels are numbers from 0. A count below 1 is
    left to the reader, whose error names the folder.
    """

    format: Literal["frames"] = "frames"
    pattern: Annotated[str, AfterValidator(_checked_pattern)] = Field(
        "{:06d}.jpg", description="format string of the frames' file names"
    )
    first_frame: FirstFrame = 1

    @cached_property
    def classes(self) -> list[str] | None:
        return None if self._labels.given is None else self._labels.class_names()

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        records = []
        numbers = []
        for where, line in file.numbered_lines():
            fields = line.rsplit(maxsplit=2)
            count, label = (integer(field) for field in fields[1:]) if len(fields) == 3 else (None, None)
            if count is None or label is None:
                raise InputError(
                    f"{where}: expected `folder num_frames label`, where the last two are whole numbers, "
                    f"got {shown(line)}; set {file.key} to a list of frame folders or correct the line"
                )
            numbers.append((where, label))
            folder = fields[0].lstrip()
            path = os.path.join(self.root, folder)
            records.append(VideoRecord(path, label, count, self.pattern, first_frame=self.first_frame, listed=folder))
        check_numbers(numbers, self.classes, self._labels)
        return split_by_presence(not_empty(records, file))


class CsvLists(ListedSource):
    """Videos in csv files with one row `path,label` per video and an optional header, `path,label` or `video,label`.

    A first row that looks like another header is an error: its label would be a class without videos, and if all other
    labels are numbers, would turn them into names.

    A label is a number from 0 or a class name. With a labels file, a label that is one of its lines is that name, and
    any other must be a number. Without one, the training list decides (the validation list if no training list is
    given): if all its labels are numbers, those of the other list must be too, and the class names are unknown;
    otherwise all are names, even those that look like numbers, and their sorted order gives the labels.
    """

    format: Literal["csv"] = "csv"

    @cached_property
    def classes(self) -> list[str] | None:
        file = self._class_file
        if file is self._labels:
            return file.class_names()
        names = {label for _, _, label in self._rows(file)}
        return None if all(integer(name) is not None for name in names) else sorted(names)

    @property
    def _class_file(self) -> AnnotationFile:
        return self._labels if self._labels.given is not None else self._naming_list

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        labels = {name: label for label, name in enumerate(self.classes or ())}
        numbers = self.classes is None or self._class_file is self._labels
        records = []
        numbered = []
        for where, path, text in self._rows(self._lists[split]):
            label = labels.get(text)
            if label is None:
                label = integer(text) if numbers else None
                if label is None:
                    raise self._unknown(where, text)
                numbered.append((where, label))
            records.append(VideoRecord(os.path.join(self.root, path), label, listed=path))
        check_numbers(numbered, self.classes, self._labels)
        return split_by_presence(records)

    def rows(self, split: Split) -> list[tuple[str, str]]:
        """Path and label as written in the list."""
        return [(path, label) for _, path, label in self._rows(self._lists[split])]

    def _unknown(self, where: str, label: str) -> InputError:
        if self.classes is None:
            return InputError(
                f"{where}: expected a number like the labels in {self._class_file.path}, got {shown(label)}; "
                "correct it, or set data.labels to a file with all class names"
            )
        return unknown_class(where, label, self._class_file)

    def _rows(self, file: AnnotationFile) -> list[tuple[str, str, str]]:
        """Per video: its place in the file, its path and its label."""
        videos = []
        header = False
        for index, (where, row) in enumerate(file.csv_rows()):
            columns = [column.strip() for column in row]
            if index == 0 and [column.lower() for column in columns] in _HEADERS:
                header = True
                continue
            if len(columns) != 2 or not all(columns):
                raise InputError(
                    f"{where}: expected two columns `path,label` (quote a path with a comma), "
                    f"got {shown(','.join(row))}; set {file.key} to such a csv file or correct the row"
                )
            videos.append((where, row[0], nfc(columns[1])))
        if not header:
            self._check_first_row(videos)
        return not_empty(videos, file)

    def _check_first_row(self, videos: list[tuple[str, str, str]]) -> None:
        """Raise InputError if the first row is not a video but a header with other columns."""
        where, path, label = videos[0]
        if os.path.splitext(path.strip())[1] or any(label == other for _, _, other in videos[1:]):
            return
        if Folders().find(os.path.join(self.root, path)) is None:
            raise InputError(
                f"{where}: {shown(f'{path},{label}')} looks like a header (there is no such file); its columns must "
                "be `path,label` or `video,label`; rename them, or remove the line"
            )
