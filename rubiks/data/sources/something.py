"""Something-Something, and Jester, which Twenty Billion Neurons published in the same form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from rubiks.data.records import VideoRecord
from rubiks.data.sources.annotations import (
    Folders,
    file_name,
    integer,
    nfc,
    not_empty,
    shown,
    split_by_presence,
    unknown_class,
)
from rubiks.data.sources.source import FirstFrame, ListedSource, Split
from rubiks.errors import InputError
from rubiks.settings import Name


class SomethingSomethingV2(ListedSource):
    """Something-Something v2: JSON annotations and `<root>/<videos>/<id>.webm`, or .mp4 as `rubiks prepare` writes.

    The official labels file maps each template without brackets to its number, {"Approaching something with your
    camera": "0", ...}; the lists are arrays of {"id": "78687", "template": "Approaching [something] with your camera",
    ...}. Files that are not given are looked for in root and root/labels under the names of both releases, such as
    something-something-v2-train.json and train.json.
    """

    subfolder = "labels"

    format: Literal["ssv2", "builtin"] = "ssv2"  # the built-in data set has the same layout
    videos: Name = Field("20bn-something-something-v2", description="folder of the videos, relative to root")

    def official_names(self, what: Literal["labels", "train", "val"]) -> Sequence[str]:
        name = {"labels": "labels.json", "train": "train.json", "val": "validation.json"}[what]
        return f"something-something-v2-{name}", name

    @cached_property
    def classes(self) -> list[str]:
        templates = self._labels.json()
        if not isinstance(templates, dict) or not templates:
            raise InputError(
                f"{self._labels.path}: expected a JSON object of templates and their numbers, got {shown(templates)}; "
                "set data.labels to the official labels file"
            )
        names: dict[int, str] = {}
        for template, number in templates.items():
            label = integer(str(number))
            if label is None or label not in range(len(templates)) or label in names:
                raise InputError(
                    f"{self._labels.path}, {template!r}: expected a unique number from 0 to {len(templates) - 1}, "
                    f"got {shown(number)}; set data.labels to the official labels file"
                )
            names[label] = nfc(template)
        return [names[label] for label in range(len(names))]

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        entries = file.json()
        if not isinstance(entries, list):
            raise InputError(f"{file.path}: expected a JSON array of videos, got {shown(entries)}; set {file.key}")
        labels = {name: label for label, name in enumerate(self.classes)}
        records = []
        folders = Folders()
        for number, entry in enumerate(entries, start=1):
            where = f"{file.path}, entry {number}"
            video, template = self._fields(entry, where, file.key)
            name = nfc(template.replace("[", "").replace("]", ""))
            if name not in labels:
                raise InputError(
                    f"{where}: the template {shown(template)} is not in the labels file {self._labels.path}; "
                    f"set data.labels and {file.key} to files of the same release"
                )
            path = os.path.join(self.root, self.videos, file_name(video, where, "id") + ".webm")
            records.append(VideoRecord(folders.video(path), labels[name], listed=video))
        return split_by_presence(not_empty(records, file), folders)

    @staticmethod
    def _fields(entry: Any, where: str, key: str) -> tuple[str, str]:
        """The id and the template of a list's entry."""
        video, template = (entry.get("id"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(video, str) or not isinstance(template, str):
            raise InputError(
                f'{where}: expected an object with the strings "id" and "template", got {shown(entry)}; '
                f"set {key} to an official list with labels (the test list has none)"
            )
        return video, template


class TwentyBNFrames(ListedSource):
    """Something-Something v1 and Jester: csv lists and a folder of frames for each video.

    The labels file has one class per line, the lists one `id;label` per line. Files that are not given are looked for
    in root and root/labels under their official names, such as jester-v1-train.csv. A video is the folder
    `<root>/<videos>/<id>` of frames 00001.jpg and so on, which are counted when it is read, or the `<id>.mp4` next to
    it that `rubiks prepare` writes.

    Labels number the sorted class names, as TSM does in its lists, not the lines of the file.
    """

    PATTERN: ClassVar[str] = "{:05d}.jpg"
    subfolder = "labels"

    format: Literal["ssv1", "jester"]
    release: Name = Field(description="prefix of the official file names: something-something-v1 or jester-v1")
    videos: Name = Field(description="folder with a subfolder for each video, relative to root")
    first_frame: FirstFrame = 1

    def official_names(self, what: Literal["labels", "train", "val"]) -> Sequence[str]:
        return (f"{self.release}-{'validation' if what == 'val' else what}.csv",)

    @cached_property
    def classes(self) -> list[str]:
        return sorted(self._labels.class_names())

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        labels = {name: label for label, name in enumerate(self.classes)}
        folders = Folders()
        records = []
        for where, line in file.numbered_lines():
            video, _, name = (field.strip() for field in line.partition(";"))
            if not name:
                raise InputError(
                    f"{where}: expected `id;label`, got {shown(line)}; set {file.key} to an official list with labels "
                    "(the test list has none)"
                )
            label = labels.get(nfc(name))
            if label is None:
                raise unknown_class(where, name, self._labels)
            folder = os.path.join(self.root, self.videos, file_name(video, where, "id"))
            path = folders.first((folder, folder + ".mp4")) or folder
            if path.endswith(".mp4"):
                records.append(VideoRecord(path, label, listed=video))
            else:
                records.append(
                    VideoRecord(path, label, pattern=self.PATTERN, first_frame=self.first_frame, listed=video)
                )
        return split_by_presence(not_empty(records, file), folders)
