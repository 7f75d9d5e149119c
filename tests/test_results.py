"""What eval.py passes on, and that what it writes and prints is correct. Lightning's predict gives known scores."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import os
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from commands import BASE
from conftest import assert_rejected, watch_flushes
from test_train_settings import list_digest

import rubiks
from rubiks import RubiksNet, parent, processes, trainers
from rubiks.data.datamodule import Loading
from rubiks.data.manifest import Entry, Manifest
from rubiks.evaluation import metrics, results
from rubiks.evaluation.collect import CollectPredictions
from rubiks.evaluation.predictions import Predictions
from rubiks.evaluation.protocols import Protocol
from rubiks.experiment import Evaluation

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

LABELS = [6, 0, 3, 1, 2, 6]  # in the list; the third video is missing, and the last but one is unreadable
PRESENT = [f"v{number}.mp4" for number in (0, 1, 3, 4, 5)]
SCORED = [0, 1, 2, 4]  # of the present ones
# Of seven classes. The right one is first only for v0, and among the first five for v0, v1 and v5.
LOGITS = np.array(
    [
        [0, 1, 2, 3, 4, 5, 9],
        [5, 6, 7, 8, 1, 2, 3],
        [3, 0, 4, 5, 6, 7, 8],
        [9, 8, 7, 0, 1, 2, 6],
    ],
    dtype=np.float32,
)


class Predicts(list):
    """The calls of Lightning's predict, in order; `during` is what happens in each."""

    during = staticmethod(lambda: None)


@pytest.fixture
def predicts(monkeypatch):
    calls = Predicts()

    def predict(trainer, module, data, **options) -> None:
        calls.append(SimpleNamespace(trainer=trainer, module=module, data=data, options=options))
        calls[-1].seed = torch.initial_seed()
        calls.during()
        (collected,) = trainer.callbacks
        assert isinstance(collected, CollectPredictions)
        collected.indices = torch.tensor(SCORED)
        # In other orders of frames, fewer are right.
        orders = [torch.from_numpy(LOGITS).roll(2 * order, dims=1) for order in range(len(module.orders))]
        collected.logits = torch.stack(orders, dim=1)
        collected.labels = torch.tensor([data.records["val"][index].label for index in SCORED])
        collected.readers = {"decord": 3, "pyav": 1}
        collected.bad = {"videos/v4.mp4": "is broken"}

    monkeypatch.setattr(pl.Trainer, "predict", predict)
    return calls


@pytest.fixture
def listed(tmp_path) -> tuple[str, ...]:
    """The choices of a list of six videos, of which one is missing."""
    (tmp_path / "videos").mkdir()
    for name in PRESENT:
        (tmp_path / "videos" / name).touch()
    (tmp_path / "list.csv").write_text("".join(f"v{number}.mp4,{label}\n" for number, label in enumerate(LABELS)))
    choices = ("data=csv", "data.root=videos", "data.val_list=list.csv", "data.num_classes=7")
    return (*choices, "data.on_error=skip", "data.max_bad=0.5", "run=scores")


def save(path, variant: str = "rubiks3d", num_frames: int = 5, budget: float | None = None, **described) -> RubiksNet:
    """Write an official file, or a checkpoint of ours with this description."""
    net = RubiksNet("tiny", 7, variant, num_frames)
    if budget is not None:
        net.harden(budget)
    if described:
        described |= {"tier": "tiny", "variant": variant, "num_classes": 7, "num_frames": num_frames}
        weights = {f"net.{key}": value for key, value in net.state_dict().items()}
        torch.save({"state_dict": weights, "rubiks": described}, path)
    else:
        net.save_pretrained(path)
    return net


def written(tmp_path) -> dict:
    return json.loads((tmp_path / "outputs/scores/results.json").read_text())


def test_every_number_and_name_that_is_written_is_true(listed, commands, predicts, tmp_path, monkeypatch):
    flushed = watch_flushes(monkeypatch)
    net = save(tmp_path / "net.pth.tar", "rubiks3d-aq", budget=0.125)
    manifest = Manifest(tmp_path / "videos", "known.jsonl")
    manifest.append(Entry("v1.mp4", 0, 0, sha256="cd", frames=9, key_frames=1, seek="any"))
    times = iter((100.0, 112.3456))
    monkeypatch.setattr("rubiks.cli.evaluate.time", SimpleNamespace(perf_counter=lambda: next(times)))
    before = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    output = commands.evaluate(
        *listed, "ckpt=net.pth.tar", "protocol=two_clip", "protocol.crops=1", "frame_order=reversed", "data.size=40",
        "data.num_frames=3", "batch_size=2", "seed=9", "precision=bf16-mixed", "data.manifest=known.jsonl",
        "data.reader=pyav", "data.timeout=44", "data.workers=3", "save_predictions=deep/scores.npz",
    )  # fmt: skip

    numbers = written(tmp_path)
    date = datetime.datetime.fromisoformat(numbers.pop("date"))
    assert before <= date <= datetime.datetime.now(datetime.timezone.utc)
    assert date.utcoffset() == datetime.timedelta(0)
    labels = np.array([6, 0, 1, 6])
    names = ["v0.mp4", "v1.mp4", "v3.mp4", "v5.mp4"]
    scored = Predictions(names, labels, LOGITS, [str(label) for label in range(7)])
    curve = numbers.pop("reliability")
    assert {name: len(values) for name, values in curve.items()} == {"counts": 15, "confidence": 15, "accuracy": 15}
    assert numbers.pop("calibration_error") == pytest.approx(metrics.reliability(scored).error)
    assert numbers == {
        "top1": 100 * np.mean(LOGITS.argmax(1) == labels),
        "top5": 100 * np.mean([label in np.argsort(-row)[:5] for row, label in zip(LOGITS, labels, strict=True)]),
        "mean_class_accuracy": pytest.approx(100 * (0.5 + 0 + 0) / 3),
        "intervals": metrics.intervals(scored),
        "data": "csv",
        "list_sha256": list_digest([(f"v{number}.mp4", label) for number, label in enumerate(LABELS) if number != 2]),
        "manifest_sha256": hashlib.sha256(b"v1.mp4\t0\tcd\t9\n").hexdigest(),
        "protocol": "custom",
        "clips": 2,
        "crops": 1,
        "crop_size": 40,
        "short_side": 46,
        "mean": "logits",
        "frame_order": "reversed",
        "sampling": "uniform",
        "window": None,
        "num_frames": 3,
        "videos": 4,
        "listed": 6,
        "left_out": 2,
        "skipped": [
            {"video": "videos/v2.mp4", "reason": "is missing"},
            {"video": "videos/v4.mp4", "reason": "is broken"},
        ],
        "readers": {"decord": 3, "pyav": 1},
        "tier": "tiny",
        "variant": "rubiks3d-aq",
        "num_classes": 7,
        "temporal_share": 357 / 2862,
        "checkpoint": "net.pth.tar",
        "checkpoint_sha256": hashlib.sha256((tmp_path / "net.pth.tar").read_bytes()).hexdigest(),
        "epoch": None,
        "seconds": 12.35,
        "device": "cpu",
        "precision": "bf16-mixed",
        "versions": {"rubiks": rubiks.__version__, "torch": torch.__version__}
        | {"decord": version("decord"), "pyav": version("av")},
    }
    assert (numbers["top1"], numbers["top5"]) == (25.0, 75.0)
    saved = np.load(tmp_path / "deep/scores.npz")
    assert saved["names"].tolist() == names
    assert saved["classes"].tolist() == scored.classes
    assert saved["labels"].tolist() == labels.tolist()
    assert np.array_equal(saved["logits"], LOGITS)

    for line in (
        "Evaluating net.pth.tar on 5 videos\n",
        "Temporal budget: 12.47% of the channels are shifted in time",
        "Frames of each clip were reversed in time",
        "Not scored: 2 of the 6 listed videos",
        "Results in outputs/scores/results.json\n",
        "Predictions in deep/scores.npz\n",
    ):
        assert line in output
    assert any(text.endswith("Evaluating net.pth.tar on 5 videos\n") for text in flushed)
    assert "rubiks3d-aq tiny on csv, custom (2 clips x 1 crop), 4 videos\n" in output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    assert rows == [
        ["top-1", "25.00", "0.00 to 75.00"],
        ["top-5", "75.00", "25.00 to 100.00"],
        ["mean class accuracy", "16.67", "0.00 to 50.00"],
    ]

    # What was passed on to get there.
    (call,) = predicts
    assert (call.seed, os.environ["PL_GLOBAL_SEED"]) == (9, "9")
    assert call.options == {"return_predictions": False}
    assert call.data.views["val"] == Protocol("custom", 2, 1, 3, 40)
    assert (call.module.orders, call.module.mean, call.module.seed) == (("reversed",), "logits", 9)
    assert [record.name for record in call.data.records["val"]] == PRESENT
    assert [record.name for record in call.data.records["val"] if record.checked is not None] == ["v1.mp4"]
    assert list(call.data.records["train"]) == []
    assert vars(call.data).items() >= {"eval_batch_size": 2, "workers": 3, "seed": 9}.items()
    assert call.data.loading == Loading(workers=3, on_error="skip", max_bad=0.5, reader="pyav", timeout=44)
    for name, tensor in net.state_dict().items():
        assert torch.equal(call.module.net.state_dict()[name], tensor), name
    assert call.trainer.checkpoint_callback is None
    assert call.trainer.loggers == []


def test_what_the_other_files_hold(listed, commands, predicts, tmp_path):
    save(tmp_path / "net.pth.tar")
    names = [f'{name} "quoted", in {name}' for name in "abcdefg"]
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    output = commands.evaluate(*listed, "data.labels=names.txt", "ckpt=net.pth.tar", "temporal=true")
    labels, predicted = [6, 0, 1, 6], [6, 3, 6, 0]

    def rows(name: str) -> list[list[str]]:
        with open(tmp_path / "outputs/scores" / name, encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    header, *classes = rows("per_class.csv")
    assert header == ["class", "support", "predicted", "precision", "recall", "f1"]
    assert [row[0] for row in classes] == names
    assert [list(map(int, row[1:3])) for row in classes] == [
        [labels.count(label), predicted.count(label)] for label in range(7)
    ]
    assert [row[3:] for row in classes] == [
        ["0.0", "0.0", "0.0"], ["", "0.0", "0.0"], ["", "", ""], ["0.0", "", "0.0"], ["", "", ""], ["", "", ""],
        ["50.0", "50.0", "50.0"],
    ]  # fmt: skip
    header, *confusion = rows("confusion.csv")
    assert header == ["label", *names]
    counts = np.zeros((7, 7), dtype=int)
    np.add.at(counts, (labels, predicted), 1)
    assert [[int(cell) for cell in row[1:]] for row in confusion] == counts.tolist()
    header, *videos = rows("predictions.csv")
    assert header[:6] == ["name", "label", "predicted", "correct", "class1", "score1"]
    assert len(header) == 14
    for video, row in enumerate(videos):
        odds = np.exp(LOGITS[video].astype(float))
        best = sorted(range(7), key=lambda label: (-odds[label], label))[:5]
        assert row[:4] == [
            f"v{(0, 1, 3, 5)[video]}.mp4", names[labels[video]], names[predicted[video]], ["no", "yes"][video == 0],
        ]  # fmt: skip
        assert row[4::2] == [names[label] for label in best]
        assert [float(score) for score in row[5::2]] == pytest.approx(odds[best] / odds.sum(), rel=1e-5)

    # They are read as they were written.
    read = results.read(tmp_path / "outputs/scores")
    assert read.numbers == written(tmp_path)
    assert np.array_equal(read.confusion, counts)
    assert [(own.name, own.support, own.recall) for own in read.classes[5:]] == [(names[5], 0, None), (names[6], 2, 50)]
    assert [(video.name, video.correct) for video in read.predictions] == [
        ("v0.mp4", True), ("v1.mp4", False), ("v3.mp4", False), ("v5.mp4", False),
    ]  # fmt: skip
    assert results.read(tmp_path / "outputs/scores/results.json").numbers == read.numbers

    # With frames in other orders, whose scores are known too.
    top1 = [100 * np.mean(np.roll(LOGITS, 2 * order, 1).argmax(1) == labels) for order in range(3)]
    assert read.numbers["temporal"] == dict(zip(("natural", "reversed", "shuffled"), top1, strict=True))
    assert read.numbers["frame_order"] == "natural"
    assert f"│ top-1, frames reversed │ {top1[1]:.2f}" in output
    refused = commands.refused("eval", *listed, "ckpt=net.pth.tar", "temporal=true", "frame_order=reversed")
    assert "temporal=true scores frames in all orders, and frame_order=reversed in one" in refused


def change(name: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    """Changes the text of a file in a folder."""

    def apply(folder: Path) -> None:
        content = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(edit(content), encoding="utf-8")

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "results.json").unlink(), "holds no results.json"),
        (change("results.json", lambda text: text[: len(text) // 2]), "results.json cannot be read: "),
        (change("results.json", lambda text: "[]"), "results.json has no top1"),
        (change("results.json", lambda text: text.replace('"top5"', '"top6"')), "results.json has no top5"),
        (lambda folder: (folder / "predictions.csv").unlink(), "predictions.csv cannot be read: No such file"),
        (lambda folder: (folder / "predictions.csv").write_bytes(b"\xff\xfe\x00"), "predictions.csv cannot be read: "),
        (change("predictions.csv", lambda text: text[:-40]), "predictions.csv, row 5: expected 14 cells, got "),
        (change("predictions.csv", lambda text: text.splitlines()[0]), "predictions.csv holds no videos"),
        (change("predictions.csv", lambda text: text.replace(",0.", ",x", 1)), "row 2: could not convert string"),
        (change("predictions.csv", lambda text: ""), "predictions.csv does not begin with the columns name, label"),
        (change("per_class.csv", lambda text: text.replace("support", "count")), "per_class.csv does not begin with"),
        (change("confusion.csv", lambda text: text.rsplit("\n", 2)[0]), "are of different evaluations"),
        (change("predictions.csv", lambda text: text.rsplit("\n", 2)[0]), "are of different evaluations"),
    ],
)
def test_damaged_files_are_named(damage, words, listed, commands, predicts, tmp_path):
    save(tmp_path / "net.pth.tar")
    commands.evaluate(*listed, "ckpt=net.pth.tar")
    folder = tmp_path / "outputs/scores"
    damage(folder)
    assert_rejected(lambda: results.read(folder), str(folder), words)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_no_result(value, listed, commands, predicts, tmp_path, monkeypatch):
    save(tmp_path / "net.pth.tar")
    monkeypatch.setitem(globals(), "LOGITS", np.where(np.arange(7) == 2, np.float32(value), LOGITS))
    message = commands.refused("eval", *listed, "ckpt=net.pth.tar")
    assert "net.pth.tar gives scores that are not finite for 4 of 4 videos, the first is v0.mp4" in message


DENSE = {"data": {"size": 40, "sampling": "dense", "window": 12}}
UNIFORM = {"data": {"size": 48, "sampling": "uniform", "window": 30}}


@pytest.mark.parametrize(
    ("config", "choices", "expected"),
    [
        (None, (), (224, 5, "uniform", None)),
        (None, ("data.sampling=dense",), (224, 5, "dense", 64)),
        ({}, ("data.size=32",), (32, 5, "uniform", None)),
        ({"data": {}}, ("data.sampling=dense", "data.window=7"), (224, 5, "dense", 7)),
        (DENSE, (), (40, 5, "dense", 12)),
        (DENSE, ("data.sampling=uniform",), (40, 5, "uniform", None)),
        (DENSE, ("data.size=48", "data.num_frames=6", "data.window=20"), (48, 6, "dense", 20)),
        (UNIFORM, (), (48, 5, "uniform", None)),
        (UNIFORM, ("data.sampling=dense",), (48, 5, "dense", 30)),
    ],
)
def test_clips_are_as_the_network_was_trained_unless_others_are_chosen(
    config, choices, expected, listed, commands, predicts, tmp_path
):
    described = {} if config is None else {"config": config, "epoch": 4}
    save(tmp_path / "net.ckpt", **described)
    commands.evaluate(*listed, *choices, "ckpt=net.ckpt")
    numbers = written(tmp_path)
    assert tuple(numbers[key] for key in ("crop_size", "num_frames", "sampling", "window")) == expected
    assert numbers["epoch"] == described.get("epoch")
    assert (numbers["variant"], "temporal_share" in numbers) == ("rubiks3d", False)
    protocol = predicts[0].data.views["val"]
    assert (protocol.size, protocol.num_frames, protocol.window) == (*expected[:2], expected[3])


def test_classes_come_from_the_checkpoint_where_the_data_names_none_and_must_be_the_same(
    listed, commands, predicts, tmp_path
):
    names = [f"class {number}" for number in range(7)]
    save(tmp_path / "net.ckpt", epoch=1, classes=names)
    unnamed = (*listed, "data.num_classes=null", "ckpt=net.ckpt")
    commands.evaluate(*unnamed)
    assert written(tmp_path)["num_classes"] == 7
    (tmp_path / "names.txt").write_text("\n".join([*names[:4], "another", *names[5:]]) + "\n")
    message = commands.refused("eval", *unnamed, "data.labels=names.txt")
    assert "class 4 is 'class 4' there and 'another' in the data set" in message
    for choice, words in (
        ("batch_size=0", "batch_size must be a whole number of at least 1, got 0"),
        ("data.num_frames=-1", "data.num_frames must be a whole number of at least 1, or null; got -1"),
        ("seed=-1", "seed must be a whole number of at least 0, got -1"),
    ):
        assert words in commands.refused("eval", *unnamed, choice)
    assert len(predicts) == 1
    # The smallest allowed.
    commands.evaluate(*unnamed, "batch_size=1", "data.num_frames=1", "seed=0")
    assert written(tmp_path)["num_frames"] == 1


def test_a_gpu_is_named_and_a_soft_network_has_no_share(listed, commands, predicts, tmp_path, monkeypatch):
    save(tmp_path / "net.pth.tar", "rubiks3d-aq")
    trainer, told = trainers.trainer, []

    def on_a_cpu(settings, gpu, *others, **options) -> pl.Trainer:  # Lightning gets the right value
        told.append(gpu)
        return trainer(settings, False, *others, **options)

    monkeypatch.setattr(Evaluation, "on_gpu", property(lambda settings: settings.device == "cpu"))
    monkeypatch.setattr(trainers, "trainer", on_a_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the name of a GPU")
    commands.evaluate(*listed, "ckpt=net.pth.tar")
    numbers = written(tmp_path)
    assert (numbers["device"], numbers["precision"], told) == ("the name of a GPU", "32-true", [True])
    assert numbers["temporal_share"] is None
    assert numbers["versions"]["torch"].split(".")[0].isdigit()


def test_a_parent_starts_its_processes_and_scores_nothing(listed, commands, predicts, tmp_path, monkeypatch):
    save(tmp_path / "net.pth.tar")
    started = []
    monkeypatch.setattr(parent, "run", lambda *arguments: started.append(arguments))
    choices = (*BASE, *listed, "ckpt=net.pth.tar", "trainer.devices=2", "process_timeout=21")
    status, out, err = commands.run("eval", choices)
    assert (status, "Evaluating" in out, err) == (0, False, "")
    assert started == [("eval", 2, 1, Path("outputs/scores"), list(choices), 21)]
    assert predicts == []
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_two_speaks_and_writes(rank, listed, commands, predicts, tmp_path, monkeypatch):
    save(tmp_path / "net.pth.tar")
    monkeypatch.setattr(processes, "join", lambda *_: None)  # there is no other
    values = {"LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    output = commands.evaluate(
        *listed, "ckpt=net.pth.tar", "trainer=ddp", "trainer.devices=2", "save_predictions=s.npz"
    )
    assert len(predicts) == 1
    assert predicts[0].trainer.world_size == 2
    assert ("Evaluating" in output, "Results in" in output) == (rank == 0, rank == 0)
    assert (tmp_path / "outputs/scores/results.json").is_file() == (tmp_path / "s.npz").is_file() == (rank == 0)


def test_an_interrupted_evaluation_leaves_nothing(listed, commands, predicts, tmp_path):
    save(tmp_path / "net.pth.tar")

    def interrupted() -> None:
        assert (tmp_path / "outputs/scores").is_dir()
        signal.raise_signal(signal.SIGTERM)

    predicts.during = interrupted
    status, _, err = commands.run("eval", (*BASE, *listed, "ckpt=net.pth.tar"))
    assert (status, err) == (143, "interrupted by SIGTERM: there are no results yet\n")
    assert not list(tmp_path.glob("outputs/*"))
    assert isinstance(signal.getsignal(signal.SIGTERM), signal.Handlers)  # as it was before
