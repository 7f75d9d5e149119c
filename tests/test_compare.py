"""Comparing two evaluations: the statistics against exact sums and simulations, the files, and what is refused."""

from __future__ import annotations

import csv
import json
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from conftest import assert_rejected

from rubiks.evaluation import results
from rubiks.evaluation.compare import Comparison, bootstrap, compare, difference, mcnemar
from rubiks.evaluation.outcomes import read
from rubiks.evaluation.predictions import Predictions

CLASSES = ["up", "down", "left, <right>", "#1 %", "ünï", "日本", "last"]


def made(seed: int, videos: int = 200, strength: float = 1.0, classes: int = len(CLASSES)) -> Predictions:
    """Predictions of the same videos and labels for every seed; better ones for a greater strength."""
    labels = np.random.default_rng(0).integers(classes, size=videos)
    logits = np.random.default_rng(seed).normal(size=(videos, classes)) + strength * np.eye(classes)[labels]
    names = [f"video {number}" for number in range(videos)]
    return Predictions(names, labels, logits.astype(np.float32), CLASSES[:classes])


def folder(path, predictions: Predictions):
    """An evaluation's folder."""
    numbers = results.measured(predictions)
    results.write(path, numbers | {"videos": len(predictions), "protocol": "one_clip", "tier": "tiny"}, predictions)
    return path


def scores(path, predictions: Predictions, **changed):
    """The file of save_predictions=, with arrays changed, or left out where None."""
    results.write_scores(path, predictions)
    if changed:
        with np.load(path) as file:
            arrays = {**file, **changed}
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def shuffled(own: Predictions) -> Predictions:
    order = np.random.default_rng(5).permutation(len(own))
    return Predictions([own.names[i] for i in order], own.labels[order], own.logits[order], own.classes)


@pytest.fixture
def compared(tmp_path) -> Comparison:
    a, b = scores(tmp_path / "a.npz", made(1)), scores(tmp_path / "b.npz", made(2, strength=1.6))
    return compare(read(a), read(b))


# ---- statistics


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 0), (3, 3), (2, 9), (40, 71), (71, 40), (7, 0), (150, 151)])
def test_mcnemar_is_the_exact_binomial_sum(only_a, only_b):
    count, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(Fraction(comb(count, k), 2**count) for k in range(fewer + 1))
    assert mcnemar(only_a, only_b) == pytest.approx(float(min(1, 2 * tail)))


def test_the_paired_interval_covers_the_truth_in_95_percent_of_simulated_lists():
    videos, simulations = 300, 500
    shares = [0.15, 0.22, 0.63]  # of videos that only A, only B, and both or neither have right
    covered = 0
    for only_a, only_b, _ in np.random.default_rng(0).multinomial(videos, shares, simulations):
        low, high = bootstrap(videos, int(only_a), int(only_b))
        covered += low <= 100 * (shares[1] - shares[0]) <= high
    assert abs(100 * covered / simulations - 95) <= 2


def test_the_paired_interval_is_that_of_a_bootstrap_by_loops():
    rng = np.random.default_rng(3)
    a = rng.random(150) < 0.5
    b = np.where(rng.random(150) < 0.7, a, rng.random(150) < 0.6)
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(150, size=150)
        drawn.append(100 * (b[chosen].mean() - a[chosen].mean()))
    own = difference(a, b)
    np.testing.assert_allclose(own.interval, np.percentile(drawn, (2.5, 97.5)), atol=0.8)
    assert own.interval == difference(a, b).interval
    assert own.difference == pytest.approx(100 * (b.mean() - a.mean()))


def test_exchanging_the_two_mirrors_the_difference(tmp_path):
    a, b = read(scores(tmp_path / "a.npz", made(1))), read(scores(tmp_path / "b.npz", made(2, strength=1.6)))
    one, other = compare(a, b), compare(b, a)
    assert one.top1.difference == -other.top1.difference
    assert (one.top1.only_a, one.top1.only_b, one.top1.p) == (other.top1.only_b, other.top1.only_a, other.top1.p)
    assert {own.name for own in one.gained} == {own.name for own in other.lost}
    assert one.verdict().startswith("B is better by")
    assert other.verdict().startswith("A is better by")


def test_numbers_classes_and_videos_by_loops(compared):
    a, b = made(1), made(2, strength=1.6)
    right = [(bool(x), bool(y)) for x, y in zip(a.right(), b.right(), strict=True)]
    counts = {pair: right.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))}
    found = (compared.both, compared.top1.only_a, compared.top1.only_b, compared.neither)
    assert found == tuple(counts.values())
    assert compared.videos == 200
    assert (compared.top1.a, compared.top1.b) == pytest.approx((100 * a.right().mean(), 100 * b.right().mean()))
    assert compared.top5 is not None
    assert (compared.top5.a, compared.top5.b) == pytest.approx((100 * a.right(5).mean(), 100 * b.right(5).mean()))

    for own in compared.classes:
        videos = [video for video in range(200) if CLASSES[a.labels[video]] == own.name]
        recalls = [100 * sum(right[video][side] for video in videos) / len(videos) for side in (0, 1)]
        assert own.videos == len(videos)
        assert (own.a, own.b, own.change) == pytest.approx((*recalls, recalls[1] - recalls[0]))
    assert {own.name for own in compared.classes} == set(CLASSES)
    changes = [own.change for own in compared.classes]
    assert changes == sorted(changes, reverse=True)
    assert [own.change for own in compared.most_gained(3)] == [change for change in changes if change > 0][:3]
    assert [own.change for own in compared.most_lost(3)] == sorted(change for change in changes if change < 0)[:3]

    for own, before, after in ((compared.gained, False, True), (compared.lost, True, False)):
        assert {video.name for video in own} == {f"video {i}" for i in range(200) if right[i] == (before, after)}
        certain = [video.b[1] for video in own]
        assert certain == sorted(certain, reverse=True)
        for video in own:
            place = int(video.name.split()[1])
            assert video.label == CLASSES[a.labels[place]]
            assert video.a == (CLASSES[a.predicted[place]], pytest.approx(a.confidence[place]))
            assert video.b == (CLASSES[b.predicted[place]], pytest.approx(b.confidence[place]))


def test_a_small_difference_is_not_called_one():
    a = np.arange(20) < 10
    own = difference(a, np.arange(20) < 13)
    assert (own.only_a, own.only_b, own.p, own.significant) == (0, 3, 0.25, False)
    assert own.interval[0] <= own.difference <= own.interval[1]


# ---- files


def test_every_kind_of_file_gives_the_same(rubiks_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = made(1), made(2, strength=1.6)
    folder(tmp_path / "outputs" / "night", shuffled(a))
    folder(tmp_path / "b", b)
    scores(tmp_path / "a.npz", a)
    seen = []
    for one in ("night", "outputs/night", "outputs/night/results.json", "outputs/night/predictions.csv", "a.npz"):
        for other in ("b", "b/predictions.csv"):
            status, out, err = rubiks_command("compare", one, other, "--json")
            assert (status, err) == (0, "")
            facts = json.loads(out)
            place = "outputs/night" if one == "night" else one
            assert (facts.pop("a")["path"], facts.pop("b")["path"]) == (place, other)
            for key in ("classes", "gained", "lost"):  # their order depends on rounded probabilities and on the videos'
                facts[key].sort(key=str)
            seen.append(facts)
    assert len(seen) == 10
    assert all(facts == seen[0] for facts in seen)


def test_the_same_file_twice_is_no_difference(tmp_path):
    own = read(scores(tmp_path / "a.npz", made(1)))
    found = compare(own, own)
    assert (found.top1.difference, found.top1.p, found.gained, found.lost) == (0, 1, [], [])
    assert found.top1.interval[0] < 0 < found.top1.interval[1]
    assert found.verdict() == "A and B are right on the same videos."


@pytest.mark.parametrize(("classes", "videos"), [(1, 5), (1, 1), (3, 1), (3, 30)])
def test_few_classes_and_videos_work(classes, videos, tmp_path, rubiks_command):
    a, b = folder(tmp_path / "a", made(1, videos, 1, classes)), folder(tmp_path / "b", made(2, videos, 1, classes))
    status, out, _ = rubiks_command("compare", a, b, "--out", tmp_path / "out")
    assert status == 0
    assert f"{videos:,} videos; both right" in out
    assert "top-5" in out


def test_top5_is_left_out_where_a_file_has_only_the_first_class(tmp_path):
    a = scores(tmp_path / "a.npz", made(1, 2))
    rows = ([f"video {i}", CLASSES[label], "up", "no", "up", 0.5] for i, label in enumerate(made(1, 2).labels))
    header = ["name", "label", "predicted", "correct", "class1", "score1"]
    results.write_csv(tmp_path / "b.csv", header, rows)
    assert compare(read(a), read(tmp_path / "b.csv")).top5 is None


def test_files_of_class_numbers_are_compared_with_each_other_alone(tmp_path):
    a, b = made(1), made(2)
    old, older = scores(tmp_path / "a.npz", a, classes=None), scores(tmp_path / "b.npz", b, classes=None)
    assert {own.name for own in compare(read(old), read(older)).classes} == {str(label) for label in range(7)}
    new = scores(tmp_path / "c.npz", b)
    for pair in ((old, new), (new, old)):
        assert_rejected(lambda pair=pair: compare(*map(read, pair)), "a.npz does not name its classes", "c.npz does")


def test_the_page_and_the_tables(rubiks_command, tmp_path, browser):
    a, b = made(1), made(2, strength=1.6)
    a.names[0] = b.names[0] = "</script><b>\udcff.mp4"
    folder(tmp_path / "a", a)
    scores(tmp_path / "b.npz", b)
    status, out, _ = rubiks_command("compare", tmp_path / "a", tmp_path / "b.npz", "--out", tmp_path / "out")
    assert status == 0
    assert out.endswith(f"Comparison in {tmp_path / 'out' / 'compare.html'}\n")
    found = compare(read(tmp_path / "a"), read(tmp_path / "b.npz"))
    assert found.verdict() in out

    with open(tmp_path / "out" / "compare_classes.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [own.name for own in found.classes]
    assert [float(row["change"]) for row in rows] == [own.change for own in found.classes]
    with open(tmp_path / "out" / "compare_videos.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows if row["change"] == "gained"] == [own.name for own in found.gained]
    assert [row["name"] for row in rows if row["change"] == "lost"] == [own.name for own in found.lost]

    for width, dark in ((390, True), (1280, False)):
        page = browser.open(tmp_path / "out" / "compare.html", width, dark=dark)
        assert page.texts("h1") == [found.verdict()]
        assert page.texts("#class-table tbody th") == [own.name for own in found.classes]
        assert page.texts("#gained-table tbody th") == [own.name for own in found.gained]
        assert page.texts("#lost-table tbody th") == [own.name for own in found.lost]
        page.type("[data-search=class-table]", "<right>")
        assert page.texts("#class-table tbody th") == ["left, <right>"]
        assert page.problems() == []


# ---- what is refused


def test_other_videos_labels_and_classes_are_refused(tmp_path):
    own = made(1, 20)
    a = scores(tmp_path / "a.npz", own)
    names = np.array([*own.names[:-1], "another"])
    b = scores(tmp_path / "b.npz", own, names=names)
    message = ("a.npz (20 videos)", "b.npz (20)", "19 in common", "video 19 is only in", "same list")
    assert_rejected(lambda: compare(read(a), read(b)), *message)
    fewer = scores(tmp_path / "fewer.npz", made(1, 12))
    for pair in ((a, fewer), (fewer, a)):
        message = ("12 in common", f"video 12 is only in {a}")
        assert_rejected(lambda pair=pair: compare(*map(read, pair)), *message)
    labels = own.labels.copy()
    labels[3:5] = (labels[3:5] + 1) % 7
    b = scores(tmp_path / "b.npz", own, labels=labels)
    message = ("other labels for 2 of 20 videos", "video 3", repr(CLASSES[labels[3]]))
    assert_rejected(lambda: compare(read(a), read(b)), *message)
    b = scores(tmp_path / "b.npz", own, classes=np.array([*CLASSES, "more"]), logits=np.zeros((20, 8), np.float32))
    assert_rejected(lambda: compare(read(a), read(b)), "7 classes", "8", "'more' is only in", "b.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": np.full(20, 7)}, "a label below the number of classes"),
        ({"labels": np.zeros(19, int)}, "expected finite logits"),
        ({"logits": np.full((20, 7), np.nan)}, "expected finite logits"),
        ({"names": np.array(["one"] * 20)}, "20 predictions for the video one"),
        ({"names": None}, "not a file that save_predictions= wrote"),
        ({"names": np.array([{}] * 20)}, "not a file that save_predictions= wrote"),
        ({"classes": np.array(["few"])}, "expected finite logits"),
        (
            {"logits": np.zeros((0, 7), np.float32), "labels": np.zeros(0, int), "names": np.zeros(0, "U1")},
            "holds no videos",
        ),
    ],
)
def test_scores_that_cannot_be_used_are_refused(changed, message, tmp_path):
    path = scores(tmp_path / "a.npz", made(1, 20), **changed)
    assert_rejected(lambda: read(path), str(path), message, "evaluate again")


def test_damaged_files_are_refused(tmp_path, rubiks_command):
    path = scores(tmp_path / "a.npz", made(1))
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (whole[: len(whole) // 2], b"", b"text", (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        assert_rejected(lambda: read(path), str(path), "damaged")
    table = folder(tmp_path / "a", made(1)) / "predictions.csv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    for text, message in (
        ("".join(lines)[: len("".join(lines)) // 2], "row"),
        (lines[0], "holds no videos"),
        ("", "does not begin with the columns"),
        ("".join([*lines, lines[1]]), "2 predictions for the video video 0"),
    ):
        table.write_text(text, encoding="utf-8")
        assert_rejected(lambda: read(table), str(table), message)
    for place, message in (
        ("nowhere", "there is no nowhere"),
        (tmp_path, "holds no results.json"),
        (tmp_path / "a" / "confusion.csv", "does not begin with the columns"),
        (__file__, "is no result of an evaluation"),
    ):
        status, _, err = rubiks_command("compare", place, place)
        assert status == 2
        assert message in err
