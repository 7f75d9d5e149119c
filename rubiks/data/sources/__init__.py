"""Where videos, labels and class names come from: the annotation files of the supported data sets.

A source reads a list only when it is asked for that split's records, or needs the list to know the classes. Anything
wrong with a file gives one InputError that names the file, the line or entry, and the configuration key to set.
"""

from rubiks.data.sources.hmdb51 import HMDB51
from rubiks.data.sources.kinetics import Kinetics
from rubiks.data.sources.lists import CsvLists, FrameLists
from rubiks.data.sources.something import SomethingSomethingV2, TwentyBNFrames
from rubiks.data.sources.source import ListedSource, Source, Split, check_labels, describe_wrong_labels, read_lists
from rubiks.data.sources.ucf101 import UCF101

__all__ = [
    "HMDB51",
    "UCF101",
    "CsvLists",
    "FrameLists",
    "Kinetics",
    "ListedSource",
    "SomethingSomethingV2",
    "Source",
    "Split",
    "TwentyBNFrames",
    "check_labels",
    "describe_wrong_labels",
    "read_lists",
]
