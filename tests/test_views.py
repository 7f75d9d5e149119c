"""Frame sampling and views against the published rules, reimplemented with PIL."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rubiks.data.augment import Augment
from rubiks.data.views import TrainingViews, multi_scale_crop, random_segments, random_window
from rubiks.evaluation.protocols import Protocol, segment_centres, segment_starts


@given(st.integers(1, 400), st.integers(1, 32), st.integers(0, 10))
def test_sampled_frames_lie_in_their_segments(length, frames, seed):
    indices = random_segments(length, frames, np.random.default_rng(seed))
    assert len(indices) == frames
    if length < frames:
        assert not indices.any()
    else:
        segment = length // frames
        assert (indices // segment == np.arange(frames)).all()
    for fixed in (segment_centres(length, frames), segment_starts(length, frames)):
        assert fixed.min() >= 0
        assert fixed.max() < length
        assert (np.diff(fixed) >= 0).all()


def assert_all_alike(draws: Counter, outcomes: set) -> None:
    """Each outcome occurs about equally often, and no other does."""
    assert set(draws) == outcomes
    expected = draws.total() / len(outcomes)
    assert all(abs(count - expected) < 4 * expected**0.5 for count in draws.values())


def test_each_segment_draws_a_frame_of_its_own():
    """As in TSM, whatever the other segments draw; here of 4 frames each."""
    rng = np.random.default_rng(0)
    draws = Counter(tuple((random_segments(14, 3, rng) - [0, 4, 8]).tolist()) for _ in range(6400))
    assert_all_alike(draws, set(product(range(4), repeat=3)))


def test_published_test_indices():
    assert segment_centres(48, 8).tolist() == [3, 9, 15, 21, 27, 33, 39, 45]
    assert segment_starts(48, 8).tolist() == [0, 6, 12, 18, 24, 30, 36, 42]
    assert segment_centres(37, 8).tolist() == [2, 6, 11, 16, 20, 25, 30, 34]
    assert segment_centres(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def frames_of(height: int, width: int, count: int) -> torch.Tensor:
    """Smooth random frames uint8 (count, 3, H, W), in the channels-last memory that decoders give."""
    rng = np.random.default_rng(0)
    images = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
        )
        for _ in range(count)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def pil_views(frames: torch.Tensor, size: int, crops: int, short: int) -> np.ndarray:
    """The protocol's views (crops, T, size, size, 3) of one clip's frames, by PIL."""
    views = []
    for frame in frames.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(frame)
        width, height = image.size
        if width < height:
            image = image.resize((short, int(short * height / width)), Image.BILINEAR)
        else:
            image = image.resize((int(short * width / height), short), Image.BILINEAR)
        width, height = image.size
        if crops == 1:
            places = [(round((width - size) / 2), round((height - size) / 2))]
        else:
            step_x, step_y = (width - size) // 4, (height - size) // 4
            places = [(x * step_x, 2 * step_y) for x in (0, 4, 2)]
        views.append([np.asarray(image.crop((x, y, x + size, y + size))) for x, y in places])
    return np.stack(views, axis=1)


@pytest.mark.parametrize(("height", "width"), [(240, 427), (256, 340), (320, 240), (100, 100), (271, 503)])
@pytest.mark.parametrize(
    ("clips", "crops", "size", "short_side"), [(1, 1, 224, None), (2, 3, 224, None), (3, 3, 256, 256), (1, 3, 100, 131)]
)
def test_protocol_views_equal_pil(height, width, clips, crops, size, short_side):
    protocol = Protocol("any", clips, crops, num_frames=4, size=size, short_side=short_side)
    frames = frames_of(height, width, clips * 4)
    views, label = protocol(frames.unflatten(0, (clips, 4)), 5, np.random.default_rng(0))
    assert label == [5] * (clips * crops)
    assert views.shape == (clips * crops, 4, 3, size, size)
    assert views.dtype == torch.uint8
    assert protocol.num_views == clips * crops
    expected = np.concatenate([pil_views(part, size, crops, short_side or 256) for part in frames.split(4)])
    difference = np.abs(views.permute(0, 1, 3, 4, 2).numpy().astype(int) - expected)
    assert difference.max() <= 1


def test_protocol_frames():
    rng = np.random.default_rng(0)
    two = Protocol("two_clip", 2, 3, 8, 224)
    assert two.frame_indices(48, rng).tolist() == [segment_centres(48, 8).tolist(), segment_starts(48, 8).tolist()]


def test_multi_scale_crop_follows_the_rule():
    """TSM's rule for a 240x427 frame, written out: sides, pairs at most one step apart, 13 places."""
    scales = (1.0, 0.875, 0.75, 0.66)
    sides = [240, 210, 180, 158]
    pairs = {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) < 2}
    rng = np.random.default_rng(0)
    seen, places = set(), set()
    for _ in range(4000):
        top, left, height, width = multi_scale_crop(240, 427, 224, scales, rng)
        assert 0 <= top <= 240 - height
        assert 0 <= left <= 427 - width
        seen.add((height, width))
        step_y, step_x = (240 - height) // 4, (427 - width) // 4
        if step_y:
            places.add((top / step_y, left / step_x))
    assert seen == pairs
    assert places == {(y, x) for y in (0, 2, 4) for x in (0, 2, 4)} | {(1, 1), (1, 3), (3, 1), (3, 3)}


def test_a_crop_near_the_input_size_becomes_it():
    sizes = {multi_scale_crop(256, 340, 224, (1.0, 0.875), np.random.default_rng(i))[2:] for i in range(50)}
    assert sizes == {(256, 256), (224, 224), (256, 224), (224, 256)}


@pytest.mark.parametrize(
    ("short", "scale", "side"),
    [
        (255, 0.875, 224),  # 223 pixels
        (221, 1.0, 221),
        (222, 1.0, 222),  # 224 does not exist
        (224, 1.0, 224),
        (224, 0.995, 224),  # 222
        (226, 1.0, 224),
        (227, 1.0, 227),
        (300, 0.74, 224),  # 222
        (300, 0.737, 221),
    ],
)
def test_a_crop_becomes_the_input_size_within_two_pixels_where_the_frame_has_them(short, scale, side):
    for height, width in ((short, 340), (340, short)):
        assert multi_scale_crop(height, width, 224, (scale,), np.random.default_rng(0))[2:] == (side, side)


def test_training_view_is_one_crop_of_all_frames():
    frames = frames_of(120, 160, 1).expand(6, -1, -1, -1)
    views = TrainingViews(6, 64, (1.0, 0.875, 0.75, 0.66), flip=[0])
    view, labels = views(frames[None], 0, np.random.default_rng(3))
    assert labels == [0]
    assert view.shape == (1, 6, 3, 64, 64)
    assert (view == view[:, :1]).all()


def test_flip_only_where_allowed_and_with_the_label():
    frames = frames_of(64, 64, 2)
    plain = TrainingViews(2, 64, (1.0,))
    flipping = TrainingViews(2, 64, (1.0,), flip=[0, 2, 1])
    outcomes = set()
    for seed in range(20):
        view, labels = plain(frames[None], 1, np.random.default_rng(seed))
        assert (view[0] == frames).all()
        assert labels == [1]
        view, labels = flipping(frames[None], 1, np.random.default_rng(seed))
        mirrored = bool((view[0] == frames.flip(-1)).all())
        assert mirrored or bool((view[0] == frames).all())
        assert labels == [2 if mirrored else 1]
        outcomes.add(mirrored)
    assert outcomes == {True, False}
    for seed in range(5):  # a class that is its own mirror image
        assert flipping(frames[None], 0, np.random.default_rng(seed))[1] == [0]


def test_half_of_the_clips_are_mirrored_each_by_itself():
    frames, rng = torch.arange(16, dtype=torch.uint8).expand(2, 1, 3, 16, 16), np.random.default_rng(0)
    views = TrainingViews(1, 16, (1.0,), flip=[1, 0], clips=2)
    outcomes = Counter(tuple(views(frames, 0, rng)[1]) for _ in range(400))
    assert_all_alike(outcomes, set(product((0, 1), repeat=2)))


def tsm_view(frames: torch.Tensor, size: int, scales: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """TSM's GroupMultiScaleCrop with 13 places, then a flip, (T, size, size, 3), by PIL, from the rng's numbers."""
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]
    width, height = images[0].size
    sides = [int(min(width, height) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    pairs = []  # (width, height), in TSM's order
    for i, crop_height in enumerate(sides):
        for j, crop_width in enumerate(sides):
            if abs(i - j) <= 1:
                pairs.append((crop_width, crop_height))
    crop_width, crop_height = pairs[rng.integers(len(pairs))]
    w, h = (width - crop_width) // 4, (height - crop_height) // 4
    places = [
        (0, 0), (2 * w, 0), (4 * w, 0),
        (0, 2 * h), (2 * w, 2 * h), (4 * w, 2 * h),
        (0, 4 * h), (2 * w, 4 * h), (4 * w, 4 * h),
        (1 * w, 1 * h), (3 * w, 1 * h), (1 * w, 3 * h), (3 * w, 3 * h),
    ]  # fmt: skip
    x, y = places[rng.integers(len(places))]
    images = [image.crop((x, y, x + crop_width, y + crop_height)) for image in images]
    images = [image.resize((size, size), Image.BILINEAR) for image in images]
    if rng.random() < 0.5:
        images = [image.transpose(Image.FLIP_LEFT_RIGHT) for image in images]
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize(("height", "width"), [(240, 427), (256, 340), (320, 240), (226, 301)])
def test_crops_and_flips_equal_tsm_by_pil(height, width):
    scales = (1.0, 0.875, 0.75, 0.66)
    frames = frames_of(height, width, 2)
    views = TrainingViews(2, 224, scales, flip=[0])
    for seed in range(12):
        view, _ = views(frames[None], 0, np.random.default_rng(seed))
        expected = tsm_view(frames, 224, scales, np.random.default_rng(seed)).astype(int)
        difference = np.abs(view[0].permute(0, 2, 3, 1).numpy() - expected)
        assert difference.max() <= 2, seed
        assert (difference > 1).mean() < 1e-4  # rounding, once for each axis
        assert difference.mean() < 0.05


def test_clips_of_a_video_are_drawn_one_by_one():
    views = TrainingViews(4, 32, (1.0, 0.75), flip=[1, 0], clips=3)
    rng, alone = np.random.default_rng(2), np.random.default_rng(2)
    indices = views.frame_indices(97, rng)
    assert indices.tolist() == [random_segments(97, 4, alone).tolist() for _ in range(3)]
    frames = frames_of(48, 64, 12).unflatten(0, (3, 4))
    made, labels = views(frames, 0, rng)
    one = TrainingViews(4, 32, (1.0, 0.75), flip=[1, 0])
    for clip, view, label in zip(frames, made, labels, strict=True):
        expected, expected_label = one(clip[None], 0, alone)
        assert (view == expected[0]).all()
        assert [label] == expected_label


@given(st.integers(1, 400), st.integers(1, 32), st.integers(0, 100), st.integers(0, 10), st.booleans())
def test_dense_frames_keep_their_step(length, frames, more, seed, jitter):
    window = frames + more
    step = window // frames
    indices = random_window(length, frames, window, np.random.default_rng(seed), jitter)
    assert indices.min() >= 0
    assert indices.max() < length
    if length >= window:
        assert (np.abs(np.diff(indices) - step) < (step if jitter else 1)).all()
    elif not jitter:
        assert indices.tolist() == [i * step % length for i in range(frames)]


def test_dense_windows_lie_anywhere():
    def starts(jitter):
        return [random_window(70, 8, 64, np.random.default_rng(seed), jitter) for seed in range(200)]

    assert {int(indices[0]) for indices in starts(False)} == set(range(7))
    steps = np.concatenate([np.diff(indices) for indices in starts(True)])
    assert set(steps.tolist()) == set(range(1, 16))


def test_jitter_moves_each_frame_of_a_window_ahead_by_a_draw_of_its_own():
    """By up to 2 frames here, from a window with a single place. Without jitter, frames stay where they are."""
    rng = np.random.default_rng(0)
    views = TrainingViews(3, 16, (1.0,), window=11, augment=Augment(temporal_jitter=True))
    draws = Counter(tuple((views.frame_indices(11, rng)[0] - [0, 3, 6]).tolist()) for _ in range(5400))
    assert_all_alike(draws, set(product(range(3), repeat=3)))
    for still in (TrainingViews(3, 16, (1.0,), window=11).frame_indices(11, rng)[0], random_window(11, 3, 11, rng)):
        assert still.tolist() == [0, 3, 6]


def test_windows_lie_in_all_places_alike():
    rng = np.random.default_rng(0)
    views = TrainingViews(2, 16, (1.0,), clips=2, window=5)
    starts = Counter()
    for _ in range(1600):
        clips = views.frame_indices(8, rng)
        assert (clips[:, 1] - clips[:, 0] == 2).all()
        starts[tuple(clips[:, 0].tolist())] += 1
    assert_all_alike(starts, set(product(range(4), repeat=2)))


@pytest.mark.parametrize(
    ("length", "window", "clips", "expected"),
    [
        (21, 11, 1, [[5, 7, 9, 11]]),
        (20, 11, 1, [[4, 6, 8, 10]]),  # the earlier of two middles
        (21, 11, 3, [[0, 2, 4, 6], [5, 7, 9, 11], [10, 12, 14, 16]]),
        (20, 11, 3, [[0, 2, 4, 6], [4, 6, 8, 10], [9, 11, 13, 15]]),
        (20, 11, 4, [[0, 2, 4, 6], [3, 5, 7, 9], [6, 8, 10, 12], [9, 11, 13, 15]]),
        (11, 11, 2, [[0, 2, 4, 6]] * 2),
        (5, 11, 1, [[0, 2, 4, 1]]),  # starts again
        (1, 11, 2, [[0, 0, 0, 0]] * 2),
    ],
)
def test_dense_clips_are_spread_from_the_first_place_to_the_last(length, window, clips, expected):
    protocol = Protocol("dense", clips, 1, 4, 224, window=window)
    assert protocol.frame_indices(length, np.random.default_rng(0)).tolist() == expected


def test_published_dense_test_indices():
    """TSM's ten starts, np.linspace(0, sample_pos - 1, num=10, dtype=int), and frames at stride 64 // T."""
    protocol = Protocol("dense_10x3", 10, 1, 8, 256, window=64)
    indices = protocol.frame_indices(300, np.random.default_rng(0))
    assert indices[:, 0].tolist() == [0, 26, 52, 78, 104, 131, 157, 183, 209, 236]
    assert (np.diff(indices) == 8).all()
    short = protocol.frame_indices(20, np.random.default_rng(0))
    assert short.tolist() == [[0, 8, 16, 4, 12, 0, 8, 16]] * 10
    (middle,) = Protocol("one_clip", 1, 1, 8, 224, window=64).frame_indices(300, np.random.default_rng(0))
    assert middle.tolist() == list(range(118, 118 + 64, 8))
