"""Settings on the command line reach the code that loads data: train.py and eval.py up to the first batch."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from videos import moving_square, write_video

from rubiks import RubiksNet
from rubiks.data.decode import VideoFile
from rubiks.data.views import random_segments

LENGTH = 30
CLASSES = ("turn left", "turn right")


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """Eight training videos, two of them of the second class, and three to validate with."""
    folder = tmp_path_factory.mktemp("data")
    names = [f"{number}.mp4" for number in range(11)]
    for name in names:
        write_video(folder / name, moving_square(LENGTH, 32, 48))
    (folder / "train.csv").write_text("".join(f"{name},{int(name in ('2.mp4', '5.mp4'))}\n" for name in names[:8]))
    (folder / "val.csv").write_text("".join(f"{name},1\n" for name in names[8:]))
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    lists = ("data.train_list=train.csv", "data.val_list=val.csv", "data.labels=labels.txt")
    return ("data=csv", f"data.root={folder}", *lists, "device=cpu")


@pytest.fixture
def read(monkeypatch):
    """The frame numbers that are read from each video, in order."""
    numbers = []
    frames = VideoFile.frames

    def noting(self, indices):
        assert len(self) == LENGTH
        numbers.append(list(indices))
        return frames(self, indices)

    monkeypatch.setattr(VideoFile, "frames", noting)
    return numbers


class Reached(Exception):  # noqa: N818
    """The command has reached the point where it would train or evaluate."""


@pytest.fixture
def loaded(commands, choices, monkeypatch):
    """The data module with which a command would train or evaluate."""

    def load(*others: str, name: str = "train"):
        found = []

        def reach(self, module, data, **_):
            found.append(data)
            raise Reached

        monkeypatch.setattr(pl.Trainer, {"train": "fit", "eval": "predict"}[name], reach)
        small = ("data.num_frames=4", "data.size=32", "recipe.batch_size=4", "logger=csv")
        with pytest.raises(Reached):
            commands.start(name, (*choices, "data.workers=0", *(small if name == "train" else ()), *others))
        (data,) = found
        return data

    return load


@pytest.mark.parametrize("seed", [0, 7])
def test_the_seed_decides_on_order_and_frames(loaded, read, seed):
    found = list(loaded(f"seed={seed}").train_dataloader())
    order = np.random.default_rng((seed, 0)).permutation(8).tolist()
    assert [index for batch in found for index in batch["index"].tolist()] == order
    drawn = [random_segments(LENGTH, 4, np.random.default_rng((seed, 0, index, 0))).tolist() for index in order]
    assert read == drawn


@pytest.mark.parametrize(("balanced", "counts"), [("false", [6, 2]), ("true", [4, 4])])
def test_classes_are_balanced_where_that_is_wanted(loaded, balanced, counts):
    data = loaded(f"data.balanced={balanced}")
    labels = [label for batch in data.train_dataloader() for label in batch["label"].flatten().tolist()]
    assert [labels.count(0), labels.count(1)] == counts
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [[0, 1, 2]]


def test_clips_are_sampled_as_is_set(loaded, read):
    data = loaded("data.sampling=dense", "data.window=12", "data.clips_per_video=3")
    batch = next(iter(data.train_dataloader()))
    assert batch["views"].shape == (4, 3, 4, 3, 32, 32)
    clips = np.array(read).reshape(12, 4)
    assert (np.diff(clips) == 3).all()
    assert len(set(clips[:, 0].tolist())) > 4
    read.clear()
    assert next(iter(data.val_dataloader()))["views"].shape == (3, 1, 4, 3, 32, 32)
    assert read == [[9, 12, 15, 18]] * 3  # in the middle
    read.clear()
    moved = loaded("data.sampling=dense", "data.window=12", "augment.temporal_jitter=true")
    next(iter(moved.train_dataloader()))
    assert len({step for clip in read for step in np.diff(clip).tolist()}) > 2


def test_each_setting_of_training_arrives(loaded):
    data = loaded(
        *("recipe.crop_scales=[0.9,0.5]", "recipe.batch_size=3", "data.size=48", "data.num_frames=5", "data.flip=auto"),
        *("augment.color_jitter=0.3", "augment.rand_augment=2", "augment.rand_augment_magnitude=7"),
        *("augment.random_erasing=0.25", "augment.random_resized_crop=[0.35,0.6]", "protocol=two_clip"),
        *("data.workers=1", "data.on_error=raise", "data.max_bad=0.2", "data.reader=pyav", "data.timeout=12"),
    )
    train, val = data.views["train"], data.views["val"]
    assert (train.size, train.num_frames, train.flip, train.window) == (48, 5, [1, 0], None)
    assert (train.clips, train.crop_scales, train._random_resized_crop.scale) == (1, (0.9, 0.5), (0.35, 0.6))
    jitter, rand, erasing = train._transforms
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3)
    assert (rand.num_ops, rand.magnitude, erasing.p) == (2, 7, 0.25)
    assert (val.name, val.clips, val.crops, val.size, val.num_frames) == ("two_clip", 2, 3, 48, 5)
    assert val.window is None
    assert (data.batch_size, data.eval_batch_size, data.workers) == (3, 3, 1)
    assert (data.loading.on_error, data.loading.max_bad) == ("raise", 0.2)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert (loader.num_workers, loader.batch_size) == (1, 3)
        assert (loader.dataset.reader, loader.dataset.timeout) == ("pyav", 12)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint trained on dense clips of 5 frames within 13, of 48 pixels."""
    net = RubiksNet("tiny", 2, "rubiks3d", 5)
    path = tmp_path_factory.mktemp("checkpoint") / "dense.ckpt"
    config = {"data": {"size": 48, "sampling": "dense", "window": 13}}
    described = {"tier": "tiny", "variant": "rubiks3d", "num_classes": 2, "num_frames": 5, "classes": list(CLASSES)}
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"rubiks": described | {"config": config, "epoch": 1}, "state_dict": state}, path)
    return f"ckpt={path}"


@pytest.mark.parametrize(
    ("words", "clips", "crops", "size"),
    [
        ([], [[8, 10, 12, 14, 16]], 1, 48),  # as in training
        (["protocol.clips=3"], [[0, 2, 4, 6, 8], [8, 10, 12, 14, 16], [17, 19, 21, 23, 25]], 1, 48),
        (["protocol=two_clip"], [[0, 2, 4, 6, 8], [17, 19, 21, 23, 25]], 3, 48),
        (["protocol=dense_10x3", "protocol.clips=1", "protocol.crops=1"], [[8, 10, 12, 14, 16]], 1, 256),
        (["protocol.sampling=uniform", "protocol.crop_size=33"], [[3, 9, 15, 21, 27]], 1, 33),
        (["data.sampling=uniform"], [[3, 9, 15, 21, 27]], 1, 48),
        (["data.sampling=uniform", "protocol=two_clip"], [[3, 9, 15, 21, 27], [0, 6, 12, 18, 24]], 3, 48),
        (["data.window=20"], [[5, 9, 13, 17, 21]], 1, 48),
        (["data.num_frames=4", "data.size=32"], [[8, 11, 14, 17]], 1, 32),
    ],
    ids=str,
)
def test_evaluation_shows_what_was_trained_unless_told_otherwise(loaded, dense, read, words, clips, crops, size):
    data = loaded(dense, "batch_size=2", "data.reader=pyav", "data.timeout=12", *words, name="eval")
    loader = data.predict_dataloader()
    assert (loader.dataset.reader, loader.dataset.timeout) == ("pyav", 12)
    found = list(loader)
    assert read == [np.ravel(clips).tolist()] * 3
    frames = len(clips[0])
    assert [batch["views"].shape for batch in found] == [
        (videos, len(clips) * crops, frames, 3, size, size) for videos in (2, 1)
    ]
    shown = [[1] * (len(clips) * crops)]  # a video's class for each of its views
    assert [batch["label"].tolist() for batch in found] == [shown * 2, shown]
