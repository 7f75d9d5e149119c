"""HMDB51."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Literal

from pydantic import Field

from rubiks.data.records import VideoRecord, is_hidden
from rubiks.data.sources.annotations import AnnotationFile, Folders, file_name, nfc, shown, split_by_presence
from rubiks.data.sources.source import OfficialSplit, Source, Split
from rubiks.errors import InputError
from rubiks.settings import Name

_FLAGS = {"train": "1", "val": "2"}


class HMDB51(Source):
    """HMDB51: a folder of videos for each class, and a list of `video.avi flag` for each class in each of three splits.

    The lists are named `<class>_test_split<1 to 3>.txt`. Flag 1 is for training, 2 for testing, which is validation
    here; videos of flag 0 are in neither. The labels are the sorted names of the classes. A video may be replaced by
    the .mp4 that `rubiks prepare` writes.
    """

    format: Literal["hmdb51"] = "hmdb51"
    split: OfficialSplit = 1
    lists: Name = Field("testTrainMulti_7030_splits", description="folder of the lists, absolute or relative to root")
    videos: Name = Field("hmdb51_org", description="folder with a subfolder for each class, relative to root")

    @property
    def classes_path(self) -> str:
        return os.path.join(self.root, self.lists)

    @property
    def _ending(self) -> str:
        return f"_test_split{self.split}.txt"

    @property
    def classes(self) -> list[str]:
        return list(self._class_lists)

    @cached_property
    def _class_lists(self) -> dict[str, str]:
        """The paths of the split's lists by class, in label order."""
        try:
            names = os.listdir(self.classes_path)
        except OSError as error:
            raise InputError(
                f"{self.classes_path}: cannot be listed: {error.strerror}; set data.root to the data set's folder, or "
                f"data.lists to the folder of the files CLASS{self._ending}"
            ) from error
        names = [name for name in names if name.endswith(self._ending) and not is_hidden(name)]
        if not names:
            raise InputError(
                f"{self.classes_path}: expected files CLASS{self._ending}, found none; set data.lists to their folder"
            )
        lists = {nfc(name.removesuffix(self._ending)): os.path.join(self.classes_path, name) for name in names}
        return dict(sorted(lists.items()))

    def annotation_files(self) -> dict[str, str]:
        """The paths of the split's lists, by class."""
        return dict(self._class_lists)

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        folders = Folders()
        records = []
        for label, (name, path) in enumerate(self._class_lists.items()):
            for where, line in AnnotationFile(self.root, os.path.abspath(path), "data.lists").numbered_lines():
                video, _, flag = line.strip().rpartition(" ")
                if not video or flag not in ("0", "1", "2"):
                    raise InputError(
                        f"{where}: expected `video.avi flag` with a flag of 0, 1 or 2, got {shown(line)}; "
                        "unpack the official files again or correct the line"
                    )
                if flag == _FLAGS[split]:
                    video = os.path.join(name, file_name(video.strip(), where, "the video"))
                    records.append(
                        VideoRecord(folders.video(os.path.join(self.root, self.videos, video)), label, listed=video)
                    )
        if not records:
            raise InputError(
                f"{self.classes_path}: the files CLASS{self._ending} list no {split} videos (flag {_FLAGS[split]}); "
                "unpack the official files again"
            )
        return split_by_presence(records, folders)
