"""What report.html is made of: from the files of an evaluation alone, and true to them."""

from __future__ import annotations

import io
import json

import evaluations
import numpy as np
import pytest
import torch
from conftest import assert_rejected
from PIL import Image

from rubiks import RubiksNet
from rubiks.evaluation import curves, learned, previews, report, report_classes, results
from rubiks.evaluation.ordering import by_confusion
from rubiks.evaluation.predictions import Predictions
from rubiks.models.activation_maps import activation_maps
from rubiks.nn import Normalize

pytestmark = pytest.mark.usefixtures("small_network")


def clip(seed: int = 0, frames: int = 4, side: int = 64) -> torch.Tensor:
    """A moving pattern, uint8 (T, 3, H, W)."""
    rng = np.random.default_rng(seed)
    picture = torch.from_numpy(rng.integers(0, 256, (3, side // 8, side // 8), dtype=np.uint8))
    picture = picture.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return torch.stack([picture.roll(8 * frame, 2) for frame in range(frames)])


# ---- the order of the matrix


def test_confused_classes_stand_together():
    """Groups of classes that are taken for each other, hidden by a random order of the labels."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 5)
    confusion = np.where(groups[:, None] == groups, rng.integers(3, 9, (30, 30)), rng.integers(0, 2, (30, 30)))
    hidden = rng.permutation(30)
    order = by_confusion(confusion[np.ix_(hidden, hidden)])
    assert sorted(order) == list(range(30))
    found = groups[hidden][order]
    assert np.count_nonzero(np.diff(found)) == 5  # every group in one piece


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_are_ordered_too(classes):
    assert sorted(by_confusion(np.zeros((classes, classes), dtype=int))) == list(range(classes))


# ---- classes and pairs


def test_pairs_and_details_of_classes(tmp_path):
    names = ["a", "b", "c", "d"]
    taken = [(0, 0)] * 5 + [(0, 1)] * 3 + [(0, 2)] * 1 + [(1, 2)] * 3 + [(1, 1)] * 1 + [(2, 0)] * 1  # label, predicted
    logits = np.zeros((len(taken), 4), np.float32)
    logits[np.arange(len(taken)), [predicted for _, predicted in taken]] = 5
    labels = np.array([label for label, _ in taken])
    evaluations.write(tmp_path, Predictions([f"{n}" for n in range(len(taken))], labels, logits, names))
    found = results.read(tmp_path)
    pairs = [
        (own["label"], own["predicted"], own["count"], own["support"]) for own in report_classes.confused_pairs(found)
    ]
    assert pairs == [("b", "c", 3, 4), ("a", "b", 3, 9), ("c", "a", 1, 1), ("a", "c", 1, 9)]
    first, _, third, last = report_classes.rows(found)
    assert (first["hits"], first["taken_for"], first["taken_from"]) == (5, [("b", 3), ("c", 1)], [("c", 1)])
    assert (third["hits"], third["taken_for"], third["taken_from"]) == (0, [("a", 1)], [("b", 3), ("a", 1)])
    assert (last["taken_for"], last["taken_from"], last["score"].recall) == ([], [], None)
    cells = report_classes.matrix(found)["cells"]
    assert {(row, column): count for row, column, count in cells} == {
        (0, 0): 5, (0, 1): 3, (0, 2): 1, (1, 1): 1, (1, 2): 3, (2, 0): 1
    }  # fmt: skip


# ---- previews


def pictures(content: bytes) -> list[np.ndarray]:
    """The frames of an animated WebP."""
    image = Image.open(io.BytesIO(content))
    frames = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        frames.append(np.asarray(image.convert("RGB")).astype(float))
    return frames


def write_previews(folder, videos: int = 60, missing: tuple[int, ...] = ()) -> tuple[Predictions, RubiksNet]:
    torch.manual_seed(1)
    net = RubiksNet("tiny", 5).eval()
    predictions = evaluations.random_predictions(list("abcde"), videos)
    evaluations.write(folder, predictions)
    clips = {place: None if place in missing else clip(place) for place in range(videos)}
    previews.write(folder, predictions, clips.get, net, evaluations.DATE)
    return predictions, net


def test_the_most_confident_mistakes_and_the_least_confident_hits_are_shown(tmp_path):
    predictions, _ = write_previews(tmp_path)
    shown, left_out = previews.read(tmp_path, results.read(tmp_path).predictions, evaluations.DATE)
    assert (len(shown), left_out) == (24, 0)
    confidence, right = predictions.confidence, predictions.right(1)
    for kind, own, sign in (("mistake", ~right, -1), ("hit", right, 1)):
        places = sorted(np.flatnonzero(own), key=lambda place: sign * confidence[place])[:12]
        assert [preview.prediction.name for preview in shown if preview.kind == kind] == [
            predictions.names[place] for place in places
        ]


def test_a_preview_shows_the_frames_in_order_and_the_map_of_the_predicted_class(tmp_path):
    predictions, net = write_previews(tmp_path)
    shown, _ = previews.read(tmp_path, results.read(tmp_path).predictions, evaluations.DATE)
    for preview in (shown[0], shown[-1]):
        place = predictions.names.index(preview.prediction.name)
        frames = clip(place)
        seen = pictures(preview.frames)
        assert len(seen) == len(frames)
        for own, frame in zip(seen, frames.movedim(1, -1).numpy().astype(float), strict=True):
            assert abs(own - frame).mean() < 20  # WebP is lossy; another frame differs by 50 and more
        label = torch.tensor([predictions.predicted[place]])
        level = activation_maps(net, Normalize()(frames)[None], label)[0]
        level = torch.nn.functional.interpolate(level[:, None], frames.shape[-2:], mode="bilinear")[:, 0].numpy()
        redness = np.stack([own[..., 0] - own[..., 2] for own in pictures(preview.map)])
        plain = frames.numpy().astype(float)
        gain = redness - (plain[:, 0] - plain[:, 2])
        high = level > np.quantile(level, 0.9)
        assert gain[high].mean() > gain[level < np.quantile(level, 0.1)].mean() + 20


def test_previews_of_noise_are_small(tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 3, 224, 224), dtype=np.uint8))
    predictions = evaluations.random_predictions(["a", "b"], 3)
    previews.write(tmp_path, predictions, lambda place: noise, RubiksNet("tiny", 2).eval(), evaluations.DATE)
    sizes = [path.stat().st_size for path in (tmp_path / "previews").glob("*.webp")]
    assert len(sizes) == 6
    assert max(sizes) <= 60_000


def test_a_video_that_cannot_be_read_again_is_left_out(tmp_path):
    predictions = evaluations.random_predictions(list("abcde"), 60)
    worst = next(place for place, kind in previews.choose(predictions))
    write_previews(tmp_path, missing=(worst,))
    shown, left_out = previews.read(tmp_path, results.read(tmp_path).predictions, evaluations.DATE)
    assert (len(shown), left_out) == (23, 0)
    assert predictions.names[worst] not in [preview.prediction.name for preview in shown]


@pytest.mark.parametrize("damage", ["removed", "cut", "empty", "text", "folder"])
def test_a_damaged_preview_is_left_out_and_counted(damage, tmp_path):
    write_previews(tmp_path)
    path = tmp_path / "previews/003-map.webp"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "removed":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"<script>"}[damage])
    shown, left_out = previews.read(tmp_path, results.read(tmp_path).predictions, evaluations.DATE)
    assert (len(shown), left_out) == (23, 1)
    assert "1 preview is left out" in report.write(tmp_path).read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"date": 1}', '{"date": "DATE", "previews": [1, {}]}'])
def test_a_damaged_list_of_previews_leaves_them_out(content, tmp_path):
    write_previews(tmp_path)
    (tmp_path / "previews/previews.json").write_text(content.replace("DATE", evaluations.DATE))
    shown, _ = previews.read(tmp_path, results.read(tmp_path).predictions, evaluations.DATE)
    assert shown == []
    report.write(tmp_path)


def test_a_list_of_previews_reads_no_other_files(tmp_path):
    write_previews(tmp_path)
    path = tmp_path / "previews/previews.json"
    found = json.loads(path.read_text())
    (tmp_path / "secret.webp").write_bytes((tmp_path / "previews/001.webp").read_bytes())
    found["previews"][0]["files"]["frames"] = "../secret.webp"
    path.write_text(json.dumps(found))
    assert previews.read(tmp_path, results.read(tmp_path).predictions, evaluations.DATE)[1] == 1


def test_previews_and_shifts_of_an_earlier_evaluation_are_not_shown(tmp_path):
    _, net = write_previews(tmp_path)
    learned.write(tmp_path, net, evaluations.DATE)
    assert report.build(results.read(tmp_path))["shifts"] is not None
    evaluations.write(tmp_path, evaluations.random_predictions(list("abcde"), 60), date="2026-06-01T00:00:00+00:00")
    shown = report.build(results.read(tmp_path))
    assert shown["previews"] == {"mistake": [], "hit": []}
    assert shown["shifts"] is None


# ---- shifts


@pytest.mark.parametrize(
    ("variant", "axes"),
    [("rubiks3d", "THW"), ("rubiks3d-aq", "HW"), ("rubiks2d", "HW"), ("fixed-tsm", "HW"), ("grouped", "")],
)
def test_shifts_are_counted_by_stage(variant, axes, tmp_path):
    net = RubiksNet("tiny", 5, variant)
    learned.write(tmp_path, net, evaluations.DATE)
    found = learned.read(tmp_path, evaluations.DATE)
    assert "".join(found["offsets"]) == axes
    widths = {"layer0": 18, "layer1": 18, "layer2": 36, "layer3": 72, "layer4": 144}
    for own in found["offsets"].values():
        assert {stage: sum(counts) for stage, counts in own["counts"].items()} == widths
    assert bool(found["attention"]) == (variant == "rubiks3d-aq")


def test_the_histograms_of_shifts_are_those_of_the_network():
    net = RubiksNet("tiny", 5)
    shift = net.backbone.layer2[0].as3.rubiks3d.shift
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "shift") and isinstance(module.shift, torch.nn.Parameter):
                module.shift.zero_()
        shift[0, :3], shift[0, 3] = 2.0, -1.0
    time = learned.summary(net)["offsets"]["T"]
    assert time["limit"] == 2
    counts = time["counts"]["layer2"]
    edges = np.linspace(-2, 2, len(counts) + 1)
    assert counts[-1] == 3
    assert counts[int(np.searchsorted(edges, -1.0)) - 1] == 1
    assert counts[len(counts) // 2] == shift.shape[1] - 4


def test_temporal_attention_is_counted():
    net = RubiksNet("tiny", 5, "rubiks3d-aq")
    net.harden(0.25)
    found = learned.summary(net)
    assert found["hard"] is True
    totals = {key: sum(own[key] for own in found["attention"].values()) for key in ("back", "stay", "ahead")}
    assert 1 - totals["stay"] / sum(totals.values()) == pytest.approx(net.temporal_share())


# ---- curves of the run


def metrics(folder, version: int, rows: list[str]) -> None:
    path = folder / f"csv/version_{version}/metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(["epoch,step,train/loss_step,val/top1", *rows]) + "\n")


def test_the_curves_of_a_run_in_several_parts(tmp_path):
    metrics(tmp_path, 9, ["0,9,3.5,", "0,9,,0.25", "0,19,3.0,", "1,29,2.5,"])
    metrics(tmp_path, 10, ["1,19,2.75,", "1,19,,0.5", "1,29,nan,", "1,39,2.0,"])  # it went on from step 10
    found = curves.read(tmp_path)
    assert found["train/loss_step"] == [(9, 3.5), (19, 2.75), (39, 2.0)]
    assert found["val/top1"] == [(9, 0.25), (19, 0.5)]


@pytest.mark.parametrize("content", ["epoch,step\n1,x\n", "a,b\n1,2\n", b"\xff\xfe\x00", "step,b\n1,2,3\n"])
def test_damaged_curves_are_said_and_left_out(content, tmp_path):
    evaluations.write(tmp_path, evaluations.random_predictions(["a", "b"], 9))
    path = tmp_path / "csv/version_0/metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_rejected(lambda: curves.read(tmp_path), str(path), "cannot be read")
    assert "metrics.csv cannot be read" in report.write(tmp_path).read_text()


def test_without_curves_there_is_no_section_of_them(tmp_path):
    evaluations.write(tmp_path, evaluations.random_predictions(["a", "b"], 9))
    assert 'id="curves"' not in report.write(tmp_path).read_text()
    metrics(tmp_path, 0, ["0,9,3.5,", "0,19,3.0,"])
    assert 'id="curves"' in report.write(tmp_path).read_text()


# ---- the command


def test_the_command_writes_the_report_from_the_files(tmp_path, monkeypatch, rubiks_command):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs/night"
    evaluations.write(folder, evaluations.random_predictions(["a", "b"], 9))
    for place in ("night", "outputs/night", folder / "results.json"):
        status, out, _ = rubiks_command("report", place)
        assert (status, out.split()[:2]) == (0, ["Report", "in"])
        assert out.split()[2].endswith("outputs/night/report.html")
        (folder / "report.html").unlink()
    assert rubiks_command("report", "night", "--out", "deep/own.html")[0] == 0
    assert (tmp_path / "deep/own.html").is_file()
    assert not (folder / "report.html").exists()


def test_what_the_command_refuses(tmp_path, monkeypatch, rubiks_command):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs/night"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    evaluations.write(folder, evaluations.random_predictions(["a", "b"], 9))
    text = (folder / "results.json").read_text()

    def refused(*words: str) -> str:
        status, out, err = rubiks_command("report", *words)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    assert "there is no nihgt" in refused("nihgt")
    assert "holds no results.json" in refused("empty")
    assert "own.html cannot be written" in refused("night", "--out", "file/own.html")
    (folder / "results.json").write_text(text[: len(text) // 2])
    assert "results.json cannot be read" in refused("night")
    kept = {name: value for name, value in json.loads(text).items() if name not in ("clips", "device")}
    (folder / "results.json").write_text(json.dumps(kept))
    assert "results.json has no clips, device; evaluate again" in refused("night")
    (folder / "results.json").write_text(text)
    (folder / "other").mkdir()
    evaluations.write(folder / "other", evaluations.random_predictions(["a", "b"], 8))
    (folder / "other/predictions.csv").replace(folder / "predictions.csv")
    assert "different evaluations" in refused("night")
