"""Which class a video shows when it is mirrored left to right, judging by the class names."""

from __future__ import annotations

import re
from collections.abc import Sequence

_OTHER = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
_SIDE = re.compile(rf"(?<![a-z])({'|'.join(_OTHER)})(?=(wards?|hand(ed)?|side|most)?(?![a-z]))")
_HIDDEN = re.compile("left(?!over)|(?<!up)(?<!b)(?<!f)(?<!out)(?<!copy)right|clockwise")  # as in "swipeleft"
_ADVERB = re.compile("right[ _](?=(out|away|now)(?![a-z]))")  # as in "pulling it right out": no side


def mirrored_labels(classes: Sequence[str]) -> tuple[list[int], list[str]]:
    """Pair the classes that mirroring exchanges: names that differ by left and right, or by the direction of a turn.

    "Pulling something from left to right" becomes "Pulling something from right to left". A class whose name
    mentions no side keeps its label.

    Args:
        classes: class names in label order.

    Returns:
        For each class the label of its mirror image, and the names whose partner is missing, which keep their label.
    """
    labels = {_normal(name): label for label, name in enumerate(classes)}
    mirrored, alone = [], []
    for label, name in enumerate(classes):
        partner = labels.get(_SIDE.sub(lambda match: _OTHER[match[0]], _normal(name)))
        text = _ADVERB.sub("", _normal(name))
        if (partner is None and _SIDE.search(text)) or _HIDDEN.search(_SIDE.sub("", text)):
            alone.append(name)
        mirrored.append(label if partner is None else partner)
    return mirrored, alone


def tells(name: str) -> bool:
    """Whether a class name consists of words, which could mention a side, and is not a number or a code."""
    return re.search("[A-Za-z]{2}", name) is not None


def _normal(name: str) -> str:
    """Lower case, SwipeLeft as swipe left, and one spelling for counterclockwise."""
    spaced = re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return re.sub(
        "(counter|anti)[-_ ]?clock[-_ ]?wise", "counterclockwise", re.sub("clock[-_ ]wise", "clockwise", spaced)
    )
