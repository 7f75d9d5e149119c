"""Frame sampling and views against the published rules, written out anew with PIL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rubiks.data.views import TrainingViews, multi_scale_crop, random_segments
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


def pil_views(frames: torch.Tensor, size: int, crops: int) -> np.ndarray:
    """The protocol's views (crops, T, size, size, 3) of one clip's frames, by PIL."""
    views = []
    for frame in frames.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(frame)
        short = round(size * 256 / 224)
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
@pytest.mark.parametrize(("name", "clips", "crops"), [("one_clip", 1, 1), ("two_clip", 2, 3)])
def test_protocol_views_equal_pil(height, width, name, clips, crops):
    protocol = Protocol(name, clips, crops, num_frames=4, size=224)
    frames = frames_of(height, width, clips * 4)
    views = protocol(frames.unflatten(0, (clips, 4)), np.random.default_rng(0))
    assert views.shape == (clips * crops, 4, 3, 224, 224)
    assert views.dtype == torch.uint8
    assert protocol.num_views == clips * crops
    expected = np.concatenate([pil_views(part, 224, crops) for part in frames.split(4)])
    difference = np.abs(views.permute(0, 1, 3, 4, 2).numpy().astype(int) - expected)
    assert difference.max() <= 1


def test_protocol_frames():
    rng = np.random.default_rng(0)
    two = Protocol("two_clip", 2, 3, 8, 224)
    assert two.frame_indices(48, rng).tolist() == [segment_centres(48, 8).tolist(), segment_starts(48, 8).tolist()]
    backwards = Protocol("one_clip", 1, 1, 8, 224, "reversed").frame_indices(48, rng)
    assert backwards[0].tolist() == segment_centres(48, 8)[::-1].tolist()
    shuffled = Protocol("two_clip", 2, 1, 8, 224, "shuffled").frame_indices(48, rng)
    assert sorted(shuffled[1]) == segment_starts(48, 8).tolist()
    assert shuffled[1].tolist() != segment_starts(48, 8).tolist()


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
    assert multi_scale_crop(255, 340, 224, (0.875,), np.random.default_rng(0))[2:] == (224, 224)  # 223 becomes 224


def test_training_view_is_one_crop_of_all_frames():
    frames = frames_of(120, 160, 1).expand(6, -1, -1, -1)
    view = TrainingViews(6, 64, (1.0, 0.875, 0.75, 0.66), flip=True)(frames[None], np.random.default_rng(3))
    assert view.shape == (1, 6, 3, 64, 64)
    assert (view == view[:, :1]).all()


def test_flip_only_where_allowed():
    frames = frames_of(64, 64, 2)
    plain = TrainingViews(2, 64, (1.0,), flip=False)
    flipping = TrainingViews(2, 64, (1.0,), flip=True)
    outcomes = set()
    for seed in range(20):
        assert (plain(frames[None], np.random.default_rng(seed))[0] == frames).all()
        view = flipping(frames[None], np.random.default_rng(seed))[0]
        mirrored = bool((view == frames.flip(-1)).all())
        assert mirrored or bool((view == frames).all())
        outcomes.add(mirrored)
    assert outcomes == {True, False}
