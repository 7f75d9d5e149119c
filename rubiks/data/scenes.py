"""Draws the clips of the built-in data set: an actor does one action that only the order of the frames reveals.

Units are those of `rubiks.data.actions`, unless a name ends in ``_px``.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rubiks.data.actions import PAIRS, SHAPES, Floats, Look, Sprite, class_names

LEVELS: tuple[str, ...] = ("plain", "textured")
FPS = 12
MIN_FRAMES, MAX_FRAMES = 24, 72

Frames = NDArray[np.uint8]

# Frame sizes (width, height) in pixels, and how often each comes.
_SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "plain": ((108, 80), (142, 80), (80, 108)),
    "textured": ((172, 128), (228, 128), (128, 172)),
}
_SIZE_ODDS = (0.6, 0.25, 0.15)

_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 220, 50),
    "green": (50, 160, 60),
    "turquoise": (60, 200, 200),
    "blue": (45, 80, 210),
    "purple": (130, 50, 160),
    "pink": (240, 140, 190),
    "white": (245, 245, 245),
}


# --------------------------------------------------------------------------------------------------------- colours


def _yuv(rgb: Floats) -> Floats:
    """Brightness and two colour differences, each about 0 to 1 or -0.5 to 0.5, of RGB values in 0 to 255."""
    y = rgb @ np.array([0.299, 0.587, 0.114])
    return np.stack([y, 0.564 * (rgb[..., 2] - y), 0.713 * (rgb[..., 0] - y)], -1) / 255


def _contrast(a: Floats, b: Floats) -> Floats:
    """How clearly two RGB colours differ; brightness counts most as the video keeps only a quarter of the colour."""
    difference = np.abs(_yuv(a) - _yuv(b))
    return np.minimum(difference[..., 0], 0.2) + 0.5 * difference.sum(-1)


def _rgb(look: Look) -> Floats:
    return np.array(_COLOURS[look.colour], float)


def cast(rng: np.random.Generator, level: str, label: int) -> list[Look]:
    """The looks of a clip's actors, one for each [something] of the class in order; must be drawn first."""
    names, shapes = list(rng.permutation(list(_COLOURS))), list(rng.permutation(list(SHAPES)))
    first = Look(str(shapes[0]), str(names[0]))
    if class_names(level)[label - label % 2].count("[something]") < 2:
        return [first]
    # The second is visible under the first.
    other = next(n for n in names[1:] if _contrast(np.array(_COLOURS[n], float), _rgb(first)) > 0.45)
    return [first, Look(str(shapes[1]), str(other))]


def _background_colours(rng: np.random.Generator, looks: Sequence[Look], level: str) -> Floats:
    """Two colours (2, 3) for a background that contrasts with the actors: the same one twice if it is plain.

    They are dark and greyish. Backgrounds of arbitrary colours dominate what happens in front of them so much that
    RubiksNet does not start to learn the actions within thousands of clips.
    """
    brightness = rng.uniform(20, 70, (64, 1, 1)) if level == "plain" else rng.uniform(40, 90, (64, 1, 1))
    choices = np.repeat(brightness + rng.uniform(-8, 8, (64, 1, 3)), 2, axis=1)
    if level == "textured":
        choices += np.array([[-1], [1]]) * rng.uniform(10, 35, (64, 1, 3))
    contrast = np.min([_contrast(choices, _rgb(look)).min(-1) for look in looks], axis=0)
    return choices[np.argmax(np.minimum(contrast, 0.45))]  # the first that is clear enough, else the clearest


# -------------------------------------------------------------------------------------------------------- textures


def _stretch(grid: Floats, height: int, width: int) -> Floats:
    """A grid enlarged to height by width pixels, bilinear."""
    for axis, size in enumerate((height, width)):
        at = np.linspace(0, grid.shape[axis] - 1.001, size)
        low = at.astype(int)
        part = (at - low)[:, None] if axis == 0 else at - low
        grid = grid.take(low, axis) * (1 - part) + grid.take(low + 1, axis) * part
    return grid


def _texture(rng: np.random.Generator, height: int, width: int, side: int) -> Frames:
    """A pattern of height by width pixels with values 0 to 255: clouds, stripes or checks."""
    kind = rng.choice(["clouds", "stripes", "checks"], p=[0.6, 0.2, 0.2])
    if kind == "clouds":
        pattern = np.zeros((height, width))
        for octave, cell in enumerate(side * rng.uniform(0.3, 0.6) / 2.0 ** np.arange(4)):
            shape = (int(height / cell) + 2, int(width / cell) + 2)
            pattern += _stretch(rng.normal(0, 0.7**octave, shape), height, width)
        return np.clip(128 + 80 * pattern, 0, 255).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    turn, pitch = rng.uniform(0, np.pi), 2 * np.pi / (side * rng.uniform(0.12, 0.35))
    pattern = np.sin(pitch * (x * np.cos(turn) + y * np.sin(turn)))
    if kind == "checks":
        pattern *= np.sin(pitch * (y * np.cos(turn) - x * np.sin(turn)))
    return np.clip(128 + 300 * pattern, 0, 255).astype(np.uint8)


def _distractors(
    rng: np.random.Generator, actors: Sequence[Sprite], frames: int, aspect: Sequence[float]
) -> list[Sprite]:
    """One to three smaller objects that rest or drift slowly, away from where the actors begin and end."""
    taken = {actor.look.colour for actor in actors}
    names = [str(n) for n in rng.permutation(list(_COLOURS)) if n not in taken]
    ends = [(np.broadcast_to(a.x, frames)[i], np.broadcast_to(a.y, frames)[i]) for a in actors for i in (0, -1)]
    smallest = min(float(np.min(actor.radius)) for actor in actors)
    size = max(float(np.max(actor.radius)) for actor in actors)
    sprites: list[Sprite] = []
    for name in names[: rng.integers(1, 4)]:
        radius = rng.uniform(0.05, max(0.06, min(0.1, smallest)))
        places = rng.uniform(-0.5, 0.5, (20, 2)) * aspect
        free = [p for p in places if all(np.hypot(*(p - end)) > radius + size for end in ends)]
        if not free:
            continue
        (x, y), drift = free[0], rng.choice((0.0, 0.12)) * rng.uniform(-1, 1, 2)
        ramp = np.linspace(-0.5, 0.5, frames)
        look = Look(str(rng.choice(list(SHAPES))), name)
        sprites.append(Sprite(look, x + drift[0] * ramp, y + drift[1] * ramp, radius, rng.uniform(0, 2 * np.pi)))
    return sprites


# --------------------------------------------------------------------------------------------------------- drawing


def _progress(rng: np.random.Generator, frames: int) -> Floats:
    """The progress of the action at each frame, 0 to 1: with pauses at either end, and steady or eased."""
    before, after = rng.uniform(-0.1, 0.15, 2).clip(0)  # no pause in two clips of five
    p = np.clip((np.linspace(0, 1, frames) - before) / (1 - before - after), 0, 1)
    ease = rng.integers(4)
    return (p, p * p * (3 - 2 * p), p**1.5, 1 - (1 - p) ** 1.5)[ease]


def _paint(frames: Frames, sprite: Sprite, shift_px: Floats, gain: Floats) -> None:
    """Draws a sprite with smoothed edges into the frames; only the pixels around it are computed."""
    count, height, width, _ = frames.shape
    side, outline, rgb = min(height, width), SHAPES[sprite.look.shape], _rgb(sprite.look)
    tracks = (sprite.x, sprite.y, sprite.radius, sprite.angle, sprite.opacity)
    for t, (x, y, radius, angle, opacity) in enumerate(zip(*(np.broadcast_to(a, count) for a in tracks), strict=True)):
        x_px, y_px = width / 2 + x * side + shift_px[t, 0], height / 2 + y * side + shift_px[t, 1]
        r_px = radius * side
        top, left = max(int(y_px - r_px) - 1, 0), max(int(x_px - r_px) - 1, 0)
        region = frames[t, top : max(int(y_px + r_px) + 2, 0), left : max(int(x_px + r_px) + 2, 0)]
        dx = (np.arange(left, left + region.shape[1], dtype=np.float32) + 0.5 - x_px)[None, :] / r_px
        dy = (np.arange(top, top + region.shape[0], dtype=np.float32) + 0.5 - y_px)[:, None] / r_px
        cos, sin = np.cos(angle), np.sin(angle)
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        distance = outline(u, v)
        if sprite.half:
            distance = np.maximum(distance, -sprite.half * u)
        cover = (np.clip(0.5 - distance * r_px, 0, 1) * opacity)[..., None]
        region[:] = region + cover * (np.minimum(rgb * gain[t], 255) - region) + 0.5


def draw(rng: np.random.Generator, level: str, label: int) -> Frames:
    """Draws one clip.

    Args:
        rng: the clip's generator; the same state gives the same clip, and for the two classes of a pair the same clip
            except for the direction of time.
        level: one of ``LEVELS``.
        label: the index of the class in ``class_names(level)``.

    Returns:
        RGB frames (frames, height, width, 3), uint8, to be shown at ``FPS`` frames per second.
    """
    looks = cast(rng, level, label)
    width, height = _SIZES[level][rng.choice(3, p=_SIZE_ODDS)]
    side, count = min(width, height), int(rng.integers(MIN_FRAMES, MAX_FRAMES + 1))
    sprites = PAIRS[label // 2].draw(rng, _progress(rng, count), looks)
    colours = _background_colours(rng, looks, level)

    if level == "plain":
        shift_px, gain = np.zeros((count, 2)), np.ones(count)
        frames = np.empty((count, height, width, 3), np.uint8)
        frames[:] = colours[0]
    else:
        sprites = _distractors(rng, sprites, count, (width / side, height / side)) + sprites
        shift_px = np.cumsum(rng.normal(0, 1, (count, 2)), axis=0)  # a hand-held camera
        shift_px -= shift_px.mean(0)
        shift_px *= rng.uniform(1, 3) / np.abs(shift_px).max()
        gain = 1 + 0.04 * np.clip(rng.normal(0, 1, count), -2, 2)
        drift_px = rng.uniform(-0.25, 0.25, 2) * side * np.linspace(-0.5, 0.5, count)[:, None]
        margin = side // 8 + 4
        texture = _texture(rng, height + 2 * margin, width + 2 * margin, side)
        corners = np.rint(margin - drift_px - shift_px).astype(int)
        palette = np.linspace(colours[0], colours[1], 256)
        frames = np.empty((count, height, width, 3), np.uint8)
        for t, (x, y) in enumerate(corners):
            shades = np.clip(palette * gain[t], 0, 255).astype(np.uint8)
            frames[t] = shades[texture[y : y + height, x : x + width]]

    for sprite in sprites:
        _paint(frames, sprite, shift_px, gain)
    return frames[::-1] if label % 2 else frames
