"""The supported data sets, and the section `data` of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from rubiks.data.datamodule import Loading
from rubiks.data.shards import Shards
from rubiks.data.sources import HMDB51, UCF101, CsvLists, FrameLists, Kinetics, SomethingSomethingV2, TwentyBNFrames
from rubiks.data.sources.images import ImageFolders
from rubiks.data.sources.source import Source
from rubiks.data.sources.synthetic import Builtin
from rubiks.errors import InputError
from rubiks.settings import Settings, taken, unknown

SOURCES: dict[str, type[Source]] = {
    "builtin": Builtin,
    "csv": CsvLists,
    "frames": FrameLists,
    "hmdb51": HMDB51,
    "images": ImageFolders,
    "jester": TwentyBNFrames,
    "kinetics": Kinetics,
    "shards": Shards,
    "ssv1": TwentyBNFrames,
    "ssv2": SomethingSomethingV2,
    "ucf101": UCF101,
}

Sampled = TypeVar("Sampled", bound=Settings)
Loaded = TypeVar("Loaded", bound=Loading)


class Data(NamedTuple, Generic[Sampled, Loaded]):
    """The section `data`, split into the parts that its keys belong to."""

    source: Source
    sampling: Sampled
    loading: Loaded


def data_settings(values: Mapping[str, Any], sampling: type[Sampled], loading: type[Loaded]) -> Data[Sampled, Loaded]:
    """Check a section `data`; its key format selects the source.

    Raises:
        InputError: the first key that is unknown, missing or wrong.
    """
    name = values.get("format")
    if not isinstance(name, str) or name not in SOURCES:
        raise InputError(f"data.format must be one of {', '.join(SOURCES)}; got {name!r}. Choose it with data=NAME")
    source = SOURCES[name]
    known = [key for part in (source, sampling, loading) for key in part.model_fields]
    for key in values:
        if key not in known:
            raise InputError(unknown("data", key, known))
    return Data(source(**taken(source, values)), sampling(**taken(sampling, values)), loading(**taken(loading, values)))
