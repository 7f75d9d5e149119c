"""Kinetics."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

from rubiks.data.records import VideoRecord
from rubiks.data.sources.annotations import (
    AnnotationFile,
    Folders,
    file_name,
    integer,
    lists_no_videos,
    nfc,
    shown,
    unknown_class,
)
from rubiks.data.sources.source import ListedSource, Split
from rubiks.errors import InputError


class Kinetics(ListedSource):
    """Kinetics-400, 600 or 700: csv annotations and clips named `<youtube_id>_<start>_<end>.mp4`.

    The csv files have a header with the columns label, youtube_id, time_start, time_end (whole seconds, six digits in
    the file name) and any others. Files that are not given are looked for in root and root/annotations as train.csv,
    and val.csv or validate.csv. Clips lie in root/<split> or root, or in a folder per class in either of these, named
    with spaces or underscores. Clips that are gone from YouTube are normal and are reported as missing.

    Without a labels file, the classes are the sorted labels of the training csv, or of the validation csv if there is
    no training csv.
    """

    missing_is_normal = True  # videos vanish from YouTube
    subfolder = "annotations"

    format: Literal["kinetics"] = "kinetics"

    def official_names(self, what: Literal["labels", "train", "val"]) -> Sequence[str]:
        return {"labels": (), "train": ("train.csv",), "val": ("val.csv", "validate.csv")}[what]

    @cached_property
    def classes(self) -> list[str]:
        file = self._class_file
        return file.class_names() if file is self._labels else sorted({label for _, label, _ in self._clips(file)})

    @property
    def _class_file(self) -> AnnotationFile:
        return self._labels if self._labels.given is not None else self._naming_list

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        file = self._lists[split]
        labels = {name: label for label, name in enumerate(self.classes)}
        tops = (os.path.join(self.root, split), self.root)
        folders = Folders()
        records, missing = [], []
        for where, label, stem in self._clips(file):
            if label not in labels:
                raise unknown_class(where, label, self._class_file)
            places = [os.path.join(top, name) for top in tops for name in ("", label, label.replace(" ", "_"))]
            paths = [
                os.path.join(place, stem + extension) for place in places for extension in (".mp4", ".mkv", ".webm")
            ]
            found = folders.first(paths)
            if found is None:
                missing.append(paths[0])
            else:
                records.append(VideoRecord(found, labels[label], listed=stem))
        if not records:
            raise InputError(
                f"{file.path}: none of its {len(missing)} videos was found; looked for {os.path.basename(missing[0])} "
                f"and the others in {tops[0]}, in {tops[1]} and in their subfolders for classes; "
                "set data.root to the folder that holds the videos"
            )
        return records, missing

    @staticmethod
    def _clips(file: AnnotationFile) -> Iterator[tuple[str, str, str]]:
        """Per row: its place in the file, the label, and the clip's file name without extension."""
        columns = ("label", "youtube_id", "time_start", "time_end")
        rows = file.csv_rows()
        where, header = next(rows)
        if not set(columns) <= set(header):
            raise InputError(
                f"{where}: expected a header with the columns {', '.join(columns)}, got {shown(', '.join(header))}; "
                f"set {file.key} to an official csv file with labels (the test list has none)"
            )
        positions = [header.index(column) for column in columns]
        empty = True
        for where, row in rows:
            if len(row) != len(header):
                raise InputError(f"{where}: expected {len(header)} columns like the header, got {len(row)}; correct it")
            label, video, *times = (row[position] for position in positions)
            start, end = (integer(time) for time in times)
            if start is None or end is None or start < 0 or end < 0:
                raise InputError(
                    f"{where}: expected time_start and time_end in whole seconds, "
                    f"got {shown(times[0])} and {shown(times[1])}; correct it"
                )
            empty = False
            yield where, nfc(label), f"{file_name(video, where, 'youtube_id')}_{start:06d}_{end:06d}"
        if empty:
            raise lists_no_videos(file)
