"""The actions of the built-in data set's clips: objects, their shapes, and where they are in each frame.

Lengths are in units of the frame's short side and positions relative to the frame's centre, x to the right and y
downwards. The classes come in pairs: a clip of the second class is drawn as one of the first and then reversed in time,
so that no single frame tells the two apart.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

# Evaluation crops the central square: actors keep within this distance of the centre along both axes.
_REACH = 0.475


class Look(NamedTuple):
    """What an object looks like, the same in all frames."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


class Sprite(NamedTuple):
    """One object through the clip; every track is a number or an array of one value per frame."""

    look: Look
    x: Floats | float
    y: Floats | float
    radius: Floats | float  # of the circle around the shape
    angle: Floats | float = 0.0  # radians, clockwise
    opacity: Floats | float = 1.0
    half: int = 0  # -1 or 1 for the left or right half of the shape, 0 for the whole


# ---------------------------------------------------------------------------------------------------------- shapes
# Signed distances to the outline, negative inside, for shapes that fit the unit circle.


def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 1.0


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - 0.74) - 0.26


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - 0.75


def _diamond(u: Floats, v: Floats) -> Floats:
    return 0.857 * np.abs(u) + 0.515 * np.abs(v) - 0.515


def _triangle(u: Floats, v: Floats) -> Floats:
    return np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.5


def _cross(u: Floats, v: Floats) -> Floats:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(a, b) - 0.94, np.minimum(a, b) - 0.3)


def _star(u: Floats, v: Floats) -> Floats:
    sector = 2 * np.pi / 5
    turn = np.abs((np.arctan2(u, -v) + sector / 2) % sector - sector / 2)  # angle to the nearest tip
    r = np.hypot(u, v)
    tip, notch = np.array([1.0, 0.0]), 0.48 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    normal = np.array([notch[1], tip[0] - notch[0]]) / np.hypot(*(tip - notch))
    return normal[0] * (r * np.cos(turn) - 1.0) + normal[1] * r * np.sin(turn)


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _disc,
    "ring": _ring,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}


# --------------------------------------------------------------------------------------------------------- actions
# Each takes the clip's generator, the progress of the action (0 to 1, one value per frame) and the looks of the
# actors, and returns their sprites from back to front.


def _wobble(rng: np.random.Generator, frames: int, size: float = 0.008) -> Floats:
    """The small unsteadiness of a hand: two slow waves of random phase."""
    time = np.linspace(0, 2 * np.pi, frames)
    return sum((size * np.sin(rng.uniform(1, 5) * time + rng.uniform(0, 7)) for _ in range(2)), np.zeros(frames))


def _slide(rng: np.random.Generator, p: Floats, look: Look) -> tuple[Sprite, Floats, Floats]:
    """A sprite without a position yet, its path along the axis of motion, and its much smaller drift across."""
    radius = rng.uniform(0.12, 0.22)
    limit = _REACH - radius
    length = rng.uniform(0.38, min(0.75, 2 * limit))
    along = rng.uniform(-limit, limit - length) + length * p
    across = np.clip(rng.uniform(-limit, limit) + rng.uniform(-0.12, 0.12) * p, -limit, limit)
    angle = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.6, 0.6) * p
    return Sprite(look, 0.0, 0.0, radius, angle), along + _wobble(rng, len(p)), across + _wobble(rng, len(p))


def _move_right(rng: np.random.Generator, p: Floats, looks: Sequence[Look]) -> list[Sprite]:
    sprite, along, across = _slide(rng, p, looks[0])
    return [sprite._replace(x=along, y=across)]


def _move_up(rng: np.random.Generator, p: Floats, looks: Sequence[Look]) -> list[Sprite]:
    sprite, along, across = _slide(rng, p, looks[0])
    return [sprite._replace(x=across, y=-along)]


def _stay(rng: np.random.Generator, p: Floats, look: Look, radius: Floats | float) -> Sprite:
    """An actor that stays in place except for a little drift."""
    limit = _REACH - 0.02 - float(np.max(radius))
    x, y = (rng.uniform(-limit, limit) + rng.uniform(-0.05, 0.05) * (p - 0.5) + _wobble(rng, len(p)) for _ in "xy")
    return Sprite(look, x, y, radius, rng.uniform(0, 2 * np.pi) + rng.uniform(-0.6, 0.6) * p)


def _approach(rng: np.random.Generator, p: Floats, looks: Sequence[Look]) -> list[Sprite]:
    small = rng.uniform(0.08, 0.15)
    factor = rng.uniform(2.1, min(3.5, 0.38 / small))
    return [_stay(rng, p, looks[0], small * factor**p)]  # exponential: a steady approach as the eye sees it


def _circle(rng: np.random.Generator, p: Floats, looks: Sequence[Look]) -> list[Sprite]:
    radius = rng.uniform(0.12, 0.18)
    way = rng.uniform(0.2, min(0.35, _REACH - radius))
    limit = _REACH - radius - way
    turn = rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(0.55, 1.1) * p  # clockwise, as y points downwards
    x = rng.uniform(-limit, limit) + way * np.cos(turn) + _wobble(rng, len(p))
    y = rng.uniform(-limit, limit) + way * np.sin(turn) + _wobble(rng, len(p))
    return [Sprite(looks[0], x, y, radius, rng.uniform(0, 2 * np.pi) + rng.uniform(-0.6, 0.6) * p)]


def _appear(rng: np.random.Generator, p: Floats, looks: Sequence[Look]) -> list[Sprite]:
    return [_stay(rng, p, looks[0], rng.uniform(0.13, 0.25))._replace(opacity=p)]


def _put_onto(rng: np.random.Generator, p: Floats, looks: Sequence[Look]) -> list[Sprite]:
    radius, base_radius = rng.uniform(0.1, 0.14), rng.uniform(0.17, 0.22)
    limit, base_limit = _REACH - radius, _REACH - base_radius
    # Positions in the frame for the base and, far enough from it, for the start of the other object.
    while True:
        base, start = rng.uniform(-base_limit, base_limit, 2), rng.uniform(-limit, limit, 2)
        if np.hypot(*(base - start)) > 0.42:
            break
    end = base + rng.uniform(-0.04, 0.04, 2)
    x, y = (start[i] + (end[i] - start[i]) * p + _wobble(rng, len(p)) for i in (0, 1))
    angle, base_angle = rng.uniform(0, 2 * np.pi, 2)
    return [
        Sprite(looks[1], base[0], base[1], base_radius, base_angle),
        Sprite(looks[0], x, y, radius, angle + rng.uniform(-0.6, 0.6) * p),
    ]


def _open(rng: np.random.Generator, p: Floats, looks: Sequence[Look]) -> list[Sprite]:
    radius, gap = rng.uniform(0.13, 0.19), rng.uniform(0.13, 0.2)
    whole = _stay(rng, p, looks[0], radius + gap)._replace(radius=radius)
    right, down = gap * p * np.cos(whole.angle), gap * p * np.sin(whole.angle)
    return [whole._replace(x=whole.x + s * right, y=whole.y + s * down, half=s) for s in (-1, 1)]


class _Pair(NamedTuple):
    forwards: str  # the template of the action as drawn
    backwards: str  # the template of the reversed clip
    draw: Callable[[np.random.Generator, Floats, Sequence[Look]], list[Sprite]]


PAIRS: tuple[_Pair, ...] = (
    _Pair("Moving [something] from left to right", "Moving [something] from right to left", _move_right),
    _Pair("Moving [something] up", "Moving [something] down", _move_up),
    _Pair("Moving [something] closer to the camera", "Moving [something] away from the camera", _approach),
    _Pair("Moving [something] clockwise", "Moving [something] counter-clockwise", _circle),
    _Pair("[Something] appearing", "[Something] vanishing", _appear),
    _Pair("Putting [something] onto [something]", "Taking [something] away from [something]", _put_onto),
    _Pair("Opening [something]", "Closing [something]", _open),
)
_PAIRS_OF_LEVEL = {"plain": 4, "textured": len(PAIRS)}


def class_names(level: str) -> list[str]:
    """The templates of a level's classes in the order of their labels, such as "Moving [something] up"."""
    return [name for pair in PAIRS[: _PAIRS_OF_LEVEL[level]] for name in (pair.forwards, pair.backwards)]
