"""UCF101."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

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
from rubiks.data.sources.source import ListedSource, OfficialSplit, Split
from rubiks.errors import InputError
from rubiks.settings import Name


class UCF101(ListedSource):
    """UCF101: lists of `class/video.avi` for each of three splits, and a folder of videos for each class.

    classInd.txt numbers the classes from 1 on, `1 ApplyEyeMakeup`; labels here are one less. The training lists repeat
    the number after the path, the test lists, which are the validation lists here, do not. Files that are not given are
    looked for in root and root/ucfTrainTestlist under their official names. A video may be replaced by the .mp4 that
    `rubiks prepare` writes.
    """

    subfolder = "ucfTrainTestlist"

    format: Literal["ucf101"] = "ucf101"
    split: OfficialSplit = 1
    videos: Name = Field("UCF-101", description="folder with a subfolder for each class, relative to root")

    def official_names(self, what: Literal["labels", "train", "val"]) -> Sequence[str]:
        number = f"{self.split:02d}"
        return ({"labels": "classInd.txt", "train": f"trainlist{number}.txt", "val": f"testlist{number}.txt"}[what],)

    @cached_property
    def classes(self) -> list[str]:
        names: list[str] = []
        for where, line in self._labels.numbered_lines():
            number, _, name = nfc(line.strip()).partition(" ")
            if integer(number) != len(names) + 1 or not name or name in names:
                raise InputError(
                    f"{where}: expected `{len(names) + 1} class` with a new class, got {shown(line)}; "
                    "set data.labels to the official classInd.txt"
                )
            names.append(name)
        if not names:
            raise InputError(f"{self._labels.path}: contains no classes; set data.labels to the official classInd.txt")
        return names

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        labels = {name: label for label, name in enumerate(self.classes)}
        folders = Folders()
        records = []
        for where, line in file.numbered_lines():
            path, _, number = line.strip().partition(" ")
            name, _, video = path.partition("/")
            if not video:
                raise InputError(
                    f"{where}: expected `class/video.avi` and, for training, the class's number, got {shown(line)}; "
                    f"set {file.key} to an official list or correct the line"
                )
            label = labels.get(nfc(name))
            if label is None:
                raise unknown_class(where, name, self._labels)
            if number and integer(number) != label + 1:
                raise InputError(
                    f"{where}: expected {label + 1}, the number of {name} in {self._labels.path}, "
                    f"got {shown(number)}; set {file.key} and data.labels to files of one release"
                )
            path = os.path.join(name, file_name(video, where, "the video"))
            records.append(VideoRecord(folders.video(os.path.join(self.root, self.videos, path)), label, listed=path))
        return split_by_presence(not_empty(records, file), folders)
