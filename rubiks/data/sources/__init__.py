"""Where videos, labels and class names come from: the annotation files of the supported data sets.

A source reads a list only when it is asked for that split's records, or needs the list to know the classes. Whatever
is wrong with a file is one InputError that names the file, the line or entry, and the configuration key to set.
"""

from rubiks.data.sources.kinetics import Kinetics
from rubiks.data.sources.lists import CsvLists, FrameLists
from rubiks.data.sources.something import SomethingSomethingV2
from rubiks.data.sources.source import ListedSource, Source, Split, check_labels

__all__ = [
    "CsvLists",
    "FrameLists",
    "Kinetics",
    "ListedSource",
    "SomethingSomethingV2",
    "Source",
    "Split",
    "check_labels",
]
