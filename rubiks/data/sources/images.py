"""Still images in a folder for each class, as records of one frame."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Literal

from pydantic import Field
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from rubiks.data.records import VideoRecord, is_hidden
from rubiks.data.sources.annotations import nfc
from rubiks.data.sources.source import Source, Split
from rubiks.errors import InputError
from rubiks.settings import Name


class ImageFolders(Source):
    """ImageNet's layout, read as torchvision's ImageFolder reads it: `<root>/<split's folder>/<class>/*.jpeg`.

    The classes are the sorted names of the folders in the training folder, or in the validation folder if there is no
    training folder. Images may lie in subfolders of their class's folder. Hidden files and folders are ignored.
    """

    format: Literal["images"] = "images"
    train_folder: Name = Field("train", description="folder of the training images, absolute or relative to root")
    val_folder: Name = Field("val", description="the same for validation")

    @property
    def _given(self) -> dict[Split, str]:
        return {"train": self.train_folder, "val": self.val_folder}

    @property
    def _folders(self) -> dict[Split, str]:
        return {split: os.path.join(self.root, folder) for split, folder in self._given.items()}

    @cached_property
    def classes(self) -> list[str]:
        return sorted({nfc(name) for name in self._class_folders(self._class_split)})

    @property
    def classes_path(self) -> str:
        return self._folders[self._class_split]

    @property
    def _class_split(self) -> Split:
        alone = os.path.isdir(self._folders["val"]) and not os.path.isdir(self._folders["train"])
        return "val" if alone else "train"

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        labels = {name: label for label, name in enumerate(self.classes)}
        folder, names = self._folders[split], self._class_folders(split)
        for name in names:
            if nfc(name) not in labels:
                raise InputError(
                    f"{os.path.join(folder, name)}: expected a class of {self.classes_path}, which has "
                    f"no folder {name!r}; set data.train_folder and data.val_folder to splits of one data set"
                )
        found = make_dataset(folder, {name: labels[nfc(name)] for name in names}, IMG_EXTENSIONS, allow_empty=True)
        images = [(path, label) for path, label in found if f"{os.sep}." not in path[len(folder) :]]  # not hidden
        if not images:
            raise InputError(
                f"{folder}: expected images ({', '.join(IMG_EXTENSIONS)}) in its subfolders, found none; set "
                f"data.root or data.{split}_folder"
            )
        names = [os.path.join(self._given[split], os.path.relpath(path, folder)) for path, _ in images]
        return [
            VideoRecord(path, label, image=True, listed=name) for (path, label), name in zip(images, names, strict=True)
        ], []

    def _class_folders(self, split: Split) -> list[str]:
        """The names of a split's folders, as spelled on the disk."""
        folder = self._folders[split]
        remedy = f"set data.root to the folder that holds it, or data.{split}_folder to its name"
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
        except FileNotFoundError:
            raise InputError(f"{folder}: no such folder; {remedy}") from None
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be listed: {error.strerror}; check data.root and data.{split}_folder"
            ) from error
        if not names:
            raise InputError(f"{folder}: expected a subfolder for each class, found none; {remedy}")
        return sorted(names)
