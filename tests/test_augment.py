"""Augmentation of clips and batches, and what a mirrored clip shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rubiks.data.augment import Augment
from rubiks.data.flip import mirrored_labels, tells
from rubiks.data.views import TrainingViews
from rubiks.errors import InputError
from rubiks.training.mixing import Mixing

EACH = {
    "crop": {"random_resized_crop": (0.2, 0.5)},
    "color": {"color_jitter": 0.5},
    "rand": {"rand_augment": 2, "rand_augment_magnitude": 15},
    "erasing": {"random_erasing": 1.0},
}


def video(frames: int = 3, height: int = 48, width: int = 64) -> torch.Tensor:
    """uint8 (1, T, 3, H, W), channels-last in memory as decoders give it; all frames are the same random picture."""
    picture = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    frame = torch.from_numpy(picture.repeat(8, 0).repeat(8, 1)).permute(2, 0, 1)
    return frame.expand(1, frames, -1, -1, -1)


@pytest.mark.parametrize("name", EACH)
def test_each_augmentation_changes_all_frames_alike(name):
    frames = video()
    plain, augmented = (TrainingViews(3, 32, (1.0,), augment=augment) for augment in (Augment(), Augment(**EACH[name])))
    outcomes, state = [], torch.get_rng_state()
    for seed in range(8):
        view, _ = augmented(frames, 0, np.random.default_rng(seed))
        assert view.shape == (1, 3, 3, 32, 32)
        assert view.dtype == torch.uint8
        assert (view == view[:, :1]).all()
        again, _ = augmented(frames, 0, np.random.default_rng(seed))
        assert (view == again).all()
        outcomes.append(view)
        assert torch.equal(torch.get_rng_state(), state)
        if name != "crop":  # earlier random numbers are as without it
            before, _ = plain(frames, 0, np.random.default_rng(seed))
            if name == "erasing":
                untouched = (view == before).all(2)
                assert 0 < untouched.float().mean() < 1
                red, green, blue = view.movedim(2, 0)
                assert ((red == 124) & (green == 116) & (blue == 104))[~untouched].all()
    assert len({view.numpy().tobytes() for view in outcomes}) > 4


def test_random_resized_crop_is_taken_from_the_video_itself():
    """Its share of the area, from a video whose pixels encode their position."""
    places = torch.stack([*torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij"), torch.zeros(96, 128)])
    views = TrainingViews(1, 64, (1.0,), augment=Augment(random_resized_crop=(0.3, 0.4)))
    for seed in range(20):
        (view,), _ = views(places.to(torch.uint8)[None, None], 0, np.random.default_rng(seed))
        height, width = (int(x.max()) - int(x.min()) + 1 for x in view[0, :2])
        assert 0.28 < height * width / (96 * 128) < 0.42
        assert 0.7 < width / height < 1.4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"random_resized_crop": (0.5, 0.2)}, "augment.random_resized_crop"),
        ({"random_resized_crop": 0.5}, "augment.random_resized_crop"),
        ({"color_jitter": 2}, "augment.color_jitter"),
        ({"rand_augment": 1.5}, "augment.rand_augment must be a whole number"),
        ({"rand_augment_magnitude": 31}, "augment.rand_augment_magnitude"),
        ({"random_erasing": "often"}, "augment.random_erasing"),
        ({"temporal_jitter": 1}, "augment.temporal_jitter"),
        ({"mixup": -0.1}, "augment.mixup"),
        ({"mixup": 1e-300}, "augment.mixup"),
        ({"cutmix": True}, "augment.cutmix"),
    ],
)
def test_bad_settings_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        Augment(**values)


# ---- mirrored classes

SSV2 = {  # all of the 174 with left or right in their names, and one more
    21: "Laying something on the table on its side, not upright",
    50: "Plugging something into something but pulling it right out as you remove your hand",
    86: "Pulling something from left to right",
    87: "Pulling something from right to left",
    93: "Pushing something from left to right",
    94: "Pushing something from right to left",
    117: "Putting something that cannot actually stand upright upright on the table, so it falls on its side",
    119: "Putting something upright on the table",
    166: "Turning the camera left while filming something",
    167: "Turning the camera right while filming something",
    168: "Turning the camera upwards while filming something",
}


def test_the_three_pairs_of_something_something():
    classes = [SSV2.get(label, f"Doing something {label}") for label in range(174)]
    mirrored, alone = mirrored_labels(classes)
    assert {label: other for label, other in enumerate(mirrored) if label != other} == {
        86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166,
    }  # fmt: skip
    assert alone == []


@pytest.mark.parametrize(
    ("names", "mirrored", "alone"),
    [
        (["abseiling", "playing guitar", "bright lights"], [0, 1, 2], []),
        (["Swiping Left", "Swiping Right", "Thumb Up"], [1, 0, 2], []),
        (["SwipeLeft", "SwipeRight"], [1, 0], []),
        (["turn_left", "turn_right"], [1, 0], []),
        (["leftwards", "rightwards", "left-hand turn", "right-hand turn"], [1, 0, 3, 2], []),
        (["Moving something clockwise", "Moving something counter-clockwise"], [1, 0], []),
        (["Turning Hand Counterclockwise", "Turning Hand Clockwise"], [1, 0], []),
        (["turn left", "turn around"], [0, 1], ["turn left"]),
        (["left hook", "right hook", "right uppercut"], [1, 0, 2], ["right uppercut"]),
        (["shake left and right"], [0], ["shake left and right"]),
        (["pull it right out", "turn right"], [0, 1], ["turn right"]),
        (["drive left out of the yard", "drive right out of the yard"], [1, 0], []),
        (["ClockWise", "CounterClockWise"], [1, 0], []),
        (["turn anti-clock-wise", "turn clock-wise"], [1, 0], []),
        (["swipeleft", "SWIPERIGHT", "copyright", "eat leftovers"], [0, 1, 2, 3], ["swipeleft", "SWIPERIGHT"]),
    ],
)
def test_pairs_of_classes(names, mirrored, alone):
    assert mirrored_labels(names) == (mirrored, alone)


def test_numbers_tell_no_side():
    assert [tells(name) for name in ("0", "173", "n01440764", "yo-yo", "Thumb Up")] == [False, False, False, True, True]


# ---- mixup and cutmix


def batch(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(count)


def test_mixup_blends_clips_and_labels_by_one_share():
    inputs, labels = batch()
    shares = []
    for step in range(20):
        mixed, targets = Mixing(0.8, 0.0, 5, seed=1)(inputs, labels, (step, 0, 0))
        share = targets[0, labels[0]].item()
        torch.testing.assert_close(targets, share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(labels.roll(1), 5))
        torch.testing.assert_close(mixed, share * inputs + (1 - share) * inputs.roll(1, 0))
        shares.append(share)
    assert min(shares) < 0.3
    assert max(shares) > 0.7


def test_cutmix_pastes_one_box_into_all_frames_and_mixes_labels_by_its_area():
    inputs, labels = batch()
    for step in range(20):
        mixed, targets = Mixing(0.0, 1.0, 5, seed=1)(inputs, labels, (step, 0, 0))
        pasted = mixed != inputs
        assert (pasted == pasted[:1, :1, :1]).all()
        assert (mixed == torch.where(pasted, inputs.roll(1, 0), inputs)).all()
        rows, columns = (pasted[0, 0, 0].any(axis) for axis in (1, 0))
        assert pasted[0, 0, 0].sum() == rows.sum() * columns.sum()  # a box
        share = 1 - pasted[0, 0, 0].float().mean()
        torch.testing.assert_close(targets, share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(labels.roll(1), 5))


@pytest.mark.parametrize("alpha", [0.3, 8.0])
def test_the_share_is_drawn_from_the_beta_distribution_of_alpha(alpha):
    inputs, labels = torch.zeros(2, 1, 1, 16, 16), torch.arange(2)
    rng = np.random.default_rng(0)
    drawn = rng.beta(alpha, alpha, 20_000)
    # A box of that share of the area; only the part within the frame counts.
    half = 16 * np.sqrt(1 - drawn) / 2
    y, x = rng.integers(16, size=(2, 20_000))
    sides = [np.clip(middle + half, 0, 16).astype(int) - np.clip(middle - half, 0, 16).astype(int) for middle in (y, x)]
    for mixing, expected in (
        (Mixing(alpha, 0.0, 2, seed=1), drawn),
        (Mixing(0.0, alpha, 2, seed=1), 1 - sides[0] * sides[1] / 256),
    ):
        shares = [mixing(inputs, labels, (step, 0, 0))[1][0, 0].item() for step in range(250)]
        assert np.mean(shares) == pytest.approx(expected.mean(), abs=0.05)
        assert np.std(shares) == pytest.approx(expected.std(), abs=0.03)


def test_a_whole_number_will_do_for_alpha():
    inputs, labels = batch()
    for alphas in ((1, 0), (0, 1)):
        assert Mixing(*alphas, 5, seed=1)(inputs, labels, (0, 0, 0))[1].shape == (5, 5)


def test_mixing_follows_from_seed_and_key_alone():
    inputs, labels = batch()
    first, _ = Mixing(0.8, 1.0, 5, seed=1)(inputs, labels, (3, 1, 0))
    torch.rand(7)
    state = torch.get_rng_state()
    mixing = Mixing(0.8, 1.0, 5, seed=1)
    mixing(inputs, labels, (9, 1, 0))
    assert torch.equal(mixing(inputs, labels, (3, 1, 0))[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [mixing(inputs, labels, key)[0] for key in ((4, 1, 0), (3, 2, 0), (3, 1, 1))]
    others.append(Mixing(0.8, 1.0, 5, seed=2)(inputs, labels, (3, 1, 0))[0])
    assert not any(torch.equal(other, first) for other in others)
    kinds = {len(mixing(inputs, labels, (step, 0, 0))[0].eq(inputs).unique()) for step in range(20)}
    assert kinds == {1, 2}  # blended everywhere, or equal in part
