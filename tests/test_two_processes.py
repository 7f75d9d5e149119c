"""Two processes of one training or evaluation, with gloo on the CPU: this one is rank 0, a forked one rank 1."""

from __future__ import annotations

import copy
import os
import socket

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from commands import BASE
from forked import end, start
from pytorch_lightning.callbacks import Callback
from test_training import frozen_statistics
from written_out import Training, one_hot

from rubiks import RubiksNet
from rubiks.cli import entry
from rubiks.data import builtin, videos
from rubiks.data.dataset import VideoDataset
from rubiks.data.sampling import Sampling
from rubiks.nn import Normalize
from rubiks.training import distributed
from rubiks.training.module import VideoClassifier
from rubiks.training.optim import running_statistics

SMALL = ("data.size=32", "data.num_frames=4", "trainer.log_every_n_steps=1")
DDP = ("trainer=ddp", "process_timeout=60")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_network"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*number of training batches.*",
        "ignore:.*LeafSpec",
        "ignore:.*in eval mode",
    ),
]


@pytest.fixture
def together(commands, tmp_path, monkeypatch):
    """Runs train.py or eval.py in two processes or more, as torchrun starts them; the output of rank 0."""

    def run(name: str, *choices: str, processes: int = 2) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        count, ddp = str(processes), (*DDP, f"trainer.devices={processes}")
        shared = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": "0"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        others = [
            start(tmp_path, name, *choices, *ddp, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(1, processes)
        ]
        try:
            with monkeypatch.context() as patch:
                for key, value in (shared | {"RANK": "0", "LOCAL_RANK": "0"}).items():
                    patch.setenv(key, value)
                more = ("logger=csv",) if name == "train" else ()
                status, out, err = commands.run(name, (*BASE, *more, *choices, *ddp))
                assert status == 0, err
        except BaseException:
            for other in others:
                other.kill()
                print(other.stderr.read())
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            ends = [end(other, timeout=30) for other in others]
        for status, out_of_other, err in ends:
            assert status == 0, err
            assert out_of_other == ""  # everything is printed once
        return out

    yield run
    for key in [key for key in os.environ if key.startswith("PL_")]:
        del os.environ[key]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """24 training and 9 validation videos, so the processes have unequal numbers of validation videos."""
    root = tmp_path_factory.mktemp("builtin")
    builtin.generate(root, "plain", 24, 9, 0, progress=False)
    return f"data.root={root}"


LISTS = ("data.train_videos=24", "data.val_videos=9")


def state(folder, name="last") -> dict:
    return torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True)


class Batches(Callback):
    """Keeps the normalised clips and labels of each training batch, of both processes together, in float64."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        views, label = batch["views"], batch["label"]
        both = [[torch.empty_like(tensor) for _ in range(2)] for tensor in (views, label)]
        for gathered, own in zip(both, (views, label), strict=True):
            dist.all_gather(gathered, own.contiguous())
        views, label = (torch.cat(parts) for parts in both)
        self.seen.append((Normalize()(views[:, 0]).double(), label[:, 0]))


def test_two_processes_take_the_steps_of_one_with_their_batches(together, data, tmp_path, monkeypatch):
    """SGD written out in float64, on both processes' batches: gradients are averaged, then clipped and normalised."""
    batches = Batches()
    original = pl.Trainer.fit

    def fit(trainer, module, *args, **options):
        batches.net = copy.deepcopy(frozen_statistics(module.net))
        trainer.callbacks.append(batches)
        return original(trainer, module, *args, **options)

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    recipe = (
        "recipe.optimizer=sgd", "recipe.momentum=0.9", "recipe.lr=0.1", "recipe.lr_batch=8", "recipe.batch_size=2",
        "recipe.weight_decay=0.01", "recipe.schedule=constant", "recipe.warmup_epochs=0", "recipe.dropout=0",
        "recipe.shift_lr_scale=0.01", "recipe.clip_grad_norm=0.5", "recipe.epochs=1", "recipe.label_smoothing=0",
        "recipe.classifier_lr_scale=1",
    )  # fmt: skip
    output = together("train", data, *LISTS, *SMALL, *recipe, "trainer.max_steps=3", "run=two")
    assert "total batch 4 " in output
    assert "0.05" in output  # 0.1 is for 8
    assert len(batches.seen) == 3
    assert len({index.item() for _, label in batches.seen for index in label}) > 1

    rates = {"weights": 0.05, "norms": 0.05, "shift": 0.05 * 0.01, "classifier": 0.05, "classifier bias": 0.05}
    training = Training(batches.net, rates, {"weights": 0.01, "classifier": 0.01}, momentum=0.9, clip=0.5)
    for clips, label in batches.seen:
        training.batch(clips, one_hot(label, 8))
        training.step(1.0)
    trained = state(tmp_path / "outputs/two")["state_dict"]
    before = dict(batches.net.named_parameters())
    for name, expected in training.net.named_parameters():
        start = before[name].double()
        moved, found = expected - start, trained[f"net.{name}"].double() - start
        assert (found - moved).norm() <= 0.01 * moved.norm() + 1e-6, name


def scores(net: RubiksNet, folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of all validation videos, one by one, in list order."""
    settings = entry.training([*LISTS, *SMALL, f"data.root={folder}", "tier=tiny"])
    chosen = settings.data
    records, _ = videos.records(chosen.source.ready(), chosen.loading, "val", 8, videos.manifest_of(chosen.source))
    samples = VideoDataset(records, settings.protocol_for(Sampling(num_frames=4, size=32)), seed=0)
    views = torch.stack([samples[0, index, 0]["views"] for index in range(len(records))])
    with torch.no_grad():
        logits = net.eval()(Normalize()(views.flatten(0, 1))).unflatten(0, views.shape[:2]).mean(1)
    return logits, torch.tensor([record.label for record in records])


def test_validation_and_best_use_the_statistics_of_the_first_process(together, data, tmp_path, monkeypatch):
    seen = {}
    start_, end_ = VideoClassifier.on_validation_start, VideoClassifier.on_validation_end

    def own(module) -> torch.Tensor:
        return torch.cat([buffer.flatten() for buffer in running_statistics(module.net)]).clone()

    def both(tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(parts, tensor)
        return parts

    def on_validation_start(self) -> None:
        before = both(own(self))
        start_(self)
        if not self.trainer.sanity_checking:
            seen["trained"], seen["validated"] = before, both(own(self))

    def on_validation_end(self) -> None:
        end_(self)
        if not self.trainer.sanity_checking:
            seen["after"] = both(own(self))

    monkeypatch.setattr(VideoClassifier, "on_validation_start", on_validation_start)
    monkeypatch.setattr(VideoClassifier, "on_validation_end", on_validation_end)
    output = together(
        "train", data, *LISTS, *SMALL, "recipe.batch_size=2", "recipe.epochs=1", "recipe.lr=0.02", "run=two"
    )
    first, second = seen["trained"]
    assert not torch.equal(first, second)  # each saw different videos
    assert [torch.equal(part, first) for part in seen["validated"]] == [True, True]
    assert torch.equal(seen["after"][0], first)
    assert torch.equal(seen["after"][1], second)
    kept = state(tmp_path / "outputs/two")["statistics"]
    assert torch.equal(kept[0], first)
    assert torch.equal(kept[1], second)

    # The printed score is that of best.ckpt over the videos of both.
    net = RubiksNet.load_pretrained(tmp_path / "outputs/two/checkpoints/best.ckpt")
    logits, label = scores(net, data.removeprefix("data.root="))
    top1 = (logits.argmax(1) == label).double().mean().item()
    loss = F.cross_entropy(logits, label).item()
    assert f"epoch 1/1  validation top-1 {top1:.1%}" in output
    assert f"loss {loss:.3f}" in output


def test_a_run_of_two_processes_in_parts_ends_as_one_in_a_piece(together, data, tmp_path):
    choices = (data, *LISTS, *SMALL, "recipe.batch_size=2", "recipe.epochs=2", "recipe.lr=0.02")
    together("train", *choices, "run=whole")
    together("train", *choices, "trainer.max_steps=8", "run=parts")
    middle = state(tmp_path / "outputs/parts")
    assert (middle["global_step"], middle["rubiks"]["position"]["videos"]) == (8, 8)
    output = together("train", *choices, "run=parts")
    assert "Resuming outputs/parts after 1 epoch and 8 videos of the next (8 steps)" in output
    ours, whole = state(tmp_path / "outputs/parts"), state(tmp_path / "outputs/whole")
    assert ours["global_step"] == whole["global_step"] == 12
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name
    for own, other in zip(ours["statistics"], whole["statistics"], strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("protocol", ["one_clip", "two_clip"])
def test_an_evaluation_in_two_processes_gives_every_video_once_in_list_order(
    together, data, commands, tmp_path, protocol
):
    torch.manual_seed(3)
    net = RubiksNet("tiny", 8, num_frames=4)
    net.new_fc.weight.data.mul_(30)  # scores that differ
    net.save_pretrained(tmp_path / "net.pth.tar")
    choices = (data, *LISTS, *SMALL, f"ckpt={tmp_path}/net.pth.tar", f"protocol={protocol}", "batch_size=2")
    together("eval", *choices, "save_predictions=two.npz", "run=two")
    commands.evaluate(*choices, "save_predictions=one.npz", "run=one")
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert len(two["names"]) == 9
    assert two["names"].tolist() == one["names"].tolist()
    assert two["labels"].tolist() == one["labels"].tolist()
    np.testing.assert_allclose(two["logits"], one["logits"], rtol=1e-4, atol=1e-5)
    assert len(np.unique(two["logits"].round(4), axis=0)) == 9


@pytest.mark.parametrize(
    ("choices", "accumulate"),
    [((), 1), ((), 2), (("variant=rubiks3d-aq", "aq.budget=0.5", "aq.soft=0.5", "recipe.optimizer=adamw"), 1)],
    ids=["rubiks3d", "accumulated", "aq in both phases"],
)
def test_two_processes_train_as_one_with_the_same_total_batch(
    together, data, commands, tmp_path, monkeypatch, choices, accumulate
):
    original = pl.Trainer.fit

    def fit(trainer, module, *args, **options):
        frozen_statistics(module.net)  # of a whole batch they would differ from those of its parts
        return original(trainer, module, *args, **options)

    reductions = []
    average = distributed.average_gradients
    monkeypatch.setattr(distributed, "average_gradients", lambda groups: reductions.append(average(groups)))
    monkeypatch.setattr(pl.Trainer, "fit", fit)
    common = (
        data, *LISTS, *SMALL, "precision=64-true", f"recipe.accumulate={accumulate}", "recipe.epochs=4",
        "recipe.lr=0.02", "recipe.lr_batch=4", "recipe.warmup_epochs=0", "recipe.dropout=0",
        f"trainer.max_steps={20 // accumulate}", *choices,
    )  # fmt: skip
    together("train", *common, "recipe.batch_size=2", "run=two")
    commands.train(*common, "recipe.batch_size=4", "run=one")
    one, two = state(tmp_path / "outputs/one"), state(tmp_path / "outputs/two")
    assert len(reductions) == 20 // accumulate
    assert one["global_step"] == two["global_step"] == 20 // accumulate
    assert any(tensor.dtype == torch.float64 for tensor in one["state_dict"].values())
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: n + t)
