"""UCF101."""

from __future__ import annotations

import os
from functools import cached_property

from rubiks.data.records import VideoRecord
from rubiks.data.sources.annotations import (
    AnnotationFile,
    Folders,
    file_name,
    integer,
    nfc,
    not_empty,
    shown,
    split_by_presence,
    unknown_class,
)
from rubiks.data.sources.source import ListedSource, Split
from rubiks.errors import InputError


class UCF101(ListedSource):
    """UCF101: lists of `class/video.avi` for each of three splits, and a folder of videos for each class.

    classInd.txt numbers the classes from 1 on, `1 ApplyEyeMakeup`; a label here is that number less one. The training
    lists repeat the number after the path, the test lists, which are the validation lists here, do not. Files that are
    not given are looked for in root and root/ucfTrainTestlist under their official names. In a video's place may be an
    .mp4, as `rubiks prepare` writes.

    Args:
        root: folder of the data set.
        split: the official split, 1, 2 or 3.
        train_list: text file, absolute or relative to root or to the working directory; None for the official name.
        val_list: the same for validation.
        labels: the same for classInd.txt.
        videos: folder of the classes' folders, relative to root.
    """

    def __init__(
        self,
        root: str,
        split: int = 1,
        train_list: str | None = None,
        val_list: str | None = None,
        labels: str | None = None,
        videos: str = "UCF-101",
    ) -> None:
        def file(given: str | None, key: str, name: str) -> AnnotationFile:
            return AnnotationFile(root, given, key, (name,), "ucfTrainTestlist")

        super().__init__(
            file(labels, "data.labels", "classInd.txt"),
            file(train_list, "data.train_list", f"trainlist{split:02d}.txt"),
            file(val_list, "data.val_list", f"testlist{split:02d}.txt"),
        )
        self._videos = os.path.join(root, videos)

    @cached_property
    def classes(self) -> list[str]:
        names: list[str] = []
        for where, line in self._labels.numbered_lines():
            number, _, name = nfc(line.strip()).partition(" ")
            if integer(number) != len(names) + 1 or not name or name in names:
                raise InputError(
                    f"{where}: expected `{len(names) + 1} class`, a class of its own, got {shown(line)}; "
                    "set data.labels to the official classInd.txt"
                )
            names.append(name)
        if not names:
            raise InputError(f"{self._labels.path}: holds no classes; set data.labels to the official classInd.txt")
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
            records.append(VideoRecord(folders.video(os.path.join(self._videos, path)), label, listed=path))
        return split_by_presence(not_empty(records, file), folders)
