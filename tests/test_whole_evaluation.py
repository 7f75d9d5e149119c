"""eval.py against an evaluation written out: one video at a time, PyAV, PIL, NumPy, no code shared."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from commands import BASE
from PIL import Image
from test_two_processes import together  # noqa: F401  a fixture
from videos import CLIPS, decode_in_order, moving_square, write_video

from rubiks import RubiksNet, assemble
from rubiks.cli.entry import compose, plain
from rubiks.data import videos
from rubiks.experiment import Evaluation
from rubiks.models.preprocessing import Preprocessing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_network"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec"),
]

FRAMES, SIZE, CLASSES = 4, 48, 6

# For each protocol: clips of a video of n frames, number of crops, their side, the short side, what is averaged.
UNIFORM = (
    lambda n: [int(n / FRAMES / 2 + n / FRAMES * i) for i in range(FRAMES)],
    lambda n: [int(n / FRAMES * i) for i in range(FRAMES)],
)


def dense(clips: int, window: int):
    def choose(n: int) -> list[list[int]]:
        last = max(0, n - window)
        starts = [int(last * clip / (clips - 1)) for clip in range(clips)]
        return [[(start + i * (window // FRAMES)) % n for i in range(FRAMES)] for start in starts]

    return choose


PROTOCOLS = {
    ("protocol=one_clip",): (lambda n: [UNIFORM[0](n)], 1, SIZE, 55, "logits"),
    ("protocol=two_clip",): (lambda n: [clip(n) for clip in UNIFORM], 3, SIZE, 55, "logits"),
    ("protocol=dense_10x3", "data.window=20"): (dense(10, 20), 3, 256, 256, "logits"),
    ("protocol=two_clip", "protocol.crop_size=40", "protocol.short_side=64", "protocol.mean=probabilities"): (
        lambda n: [clip(n) for clip in UNIFORM], 3, 40, 64, "probabilities",
    ),
}  # fmt: skip


def views_of(frames: np.ndarray, crops: int, size: int, short: int) -> list[np.ndarray]:
    """The views uint8 (T, size, size, 3) of a clip's frames."""
    views: list[list[np.ndarray]] = [[] for _ in range(crops)]
    for frame in frames:
        image = Image.fromarray(frame)
        width, height = image.size
        scaled = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
        image = image.resize(scaled, Image.BILINEAR)
        width, height = image.size
        step = (width - size) // 4, (height - size) // 4
        corners = [(x * step[0], 2 * step[1]) for x in (0, 4, 2)]
        if crops == 1:
            corners = [(round((width - size) / 2), round((height - size) / 2))]
        for view, (x, y) in zip(views, corners, strict=True):
            view.append(np.asarray(image.crop((x, y, x + size, y + size))))
    return [np.stack(view) for view in views]


def score(net: RubiksNet, views: list[np.ndarray], mean: str) -> np.ndarray:
    """A video's logits, in float32 by the network's modules."""
    logits = []
    for view in views:
        pixels = (view / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            logits.append(net(torch.from_numpy(pixels.transpose(0, 3, 1, 2)[None]).float())[0].double().numpy())
    if mean == "logits":
        return np.mean(logits, axis=0)
    odds = np.exp(logits)
    return np.log((odds / odds.sum(1, keepdims=True)).mean(0))


@pytest.fixture(scope="module")
def listed(tmp_path_factory, small_network) -> tuple[str, ...]:
    """The choices of a list of videos of several shapes and lengths, and of a network that tells them apart."""
    folder = tmp_path_factory.mktemp("videos")
    shapes = [(30, 64, 80), (23, 120, 64), (7, 48, 48), (3, 90, 130)]
    names = []
    for number, shape in enumerate(shapes):
        names.append(f"{number}.mp4")
        write_video(folder / names[-1], np.roll(moving_square(*shape), 17 * number, axis=2), gop=8)
    names += [str(path) for path in sorted(CLIPS.glob("ssv2_like*.webm"))[:1]]
    (folder / "list.csv").write_text("".join(f"{name},{place % CLASSES}\n" for place, name in enumerate(names)))
    torch.manual_seed(5)
    net = RubiksNet("tiny", CLASSES, num_frames=FRAMES)
    net.new_fc.weight.data.mul_(30)
    net.save_pretrained(folder / "net.pth.tar")
    choices = (f"data.root={folder}", f"data.val_list={folder}/list.csv", f"data.num_classes={CLASSES}")
    return ("data=csv", *choices, f"ckpt={folder}/net.pth.tar", f"data.size={SIZE}")


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=" ".join)
def test_scores_and_views_are_those_of_an_evaluation_written_out(protocol, listed, commands, tmp_path):
    choose, crops, size, short, mean = PROTOCOLS[protocol]
    commands.evaluate(*listed, *protocol, "run=ours", "save_predictions=scores.npz")
    saved = np.load(tmp_path / "scores.npz")

    settings = Evaluation(**plain(compose([*BASE, *listed, *protocol], "eval")))
    records, _ = videos.records(
        settings.data.source, settings.data.loading, "val", CLASSES, videos.manifest_of(settings.data.source)
    )
    own = settings.protocol_for(settings.data.sampling.resolve(asdict(Preprocessing(FRAMES))))
    dataset = assemble.evaluation_data(settings, records, own).predict_dataloader().dataset
    net = RubiksNet.load_pretrained(settings.ckpt)
    expected = []
    for number, record in enumerate(records):
        frames = decode_in_order(record.path)
        views = [view for clip in choose(len(frames)) for view in views_of(frames[clip], crops, size, short)]
        shown = dataset[0, number, 0]["views"].movedim(2, -1).numpy()
        assert np.abs(shown.astype(int) - np.stack(views)).max() <= 1
        expected.append(score(net, views, mean))
    assert saved["names"].tolist() == [record.name for record in records]
    assert saved["labels"].tolist() == [number % CLASSES for number in range(len(records))]
    largest = np.abs(expected).max()
    np.testing.assert_allclose(saved["logits"], expected, atol=1e-3 * largest)
    assert np.ptp(saved["logits"], axis=0).min() > 0.05 * largest  # the videos differ

    results = json.loads((tmp_path / "outputs/ours/results.json").read_text())
    assert (results["crop_size"], results["short_side"], results["mean"]) == (size, short, mean)
    assert results["protocol"] == ("custom" if "probabilities" in mean else protocol[0].partition("=")[2])


def test_scores_depend_neither_on_batches_nor_on_workers_or_processes(listed, commands, together, tmp_path):  # noqa: F811
    choices = (*listed, "protocol=two_clip", "temporal=true")
    found = {}
    for batch in (1, 3, 8):
        commands.evaluate(*choices, f"batch_size={batch}", f"save_predictions=b{batch}.npz", f"run=b{batch}")
        found[f"b{batch}"] = None
    commands.evaluate(*choices, "data.workers=2", "batch_size=3", "save_predictions=w.npz", "run=w")
    for processes in (2, 3):
        name = f"p{processes}"
        together("eval", *choices, "batch_size=2", f"save_predictions={name}.npz", f"run={name}", processes=processes)
        found[name] = None
    for name in (*found, "w"):
        assert (tmp_path / f"{name}.npz").read_bytes() == (tmp_path / "b1.npz").read_bytes(), name
        for file in ("predictions.csv", "per_class.csv", "confusion.csv"):
            ours, first = (tmp_path / f"outputs/{run}/{file}" for run in (name, "b1"))
            assert ours.read_bytes() == first.read_bytes(), (name, file)
        results, first = (json.loads((tmp_path / f"outputs/{run}/results.json").read_text()) for run in (name, "b1"))
        for changes in ("seconds", "date"):
            results.pop(changes), first.pop(changes)
        assert results == first
