"""The page of a data set: which videos it shows, and how; what is refused; what an interruption leaves."""

from __future__ import annotations

import io
import re
from pathlib import Path

import evaluations
import numpy as np
import pytest
from conftest import assert_rejected
from PIL import Image
from videos import decode_in_order, moving_square, write_video

from rubiks.data import browse, previews
from rubiks.data.augment import Augment
from rubiks.data.dataset import VideoDataset
from rubiks.data.previews import Spread
from rubiks.data.records import VideoRecord
from rubiks.data.views import TrainingViews
from rubiks.errors import VideoError
from rubiks.evaluation.predictions import Predictions

CLASSES = ["<script>alert('a')</script>", "left #1 50%", 'right &amp; "ünï" 日本', "unused"]
SPOILT, MISSING = "broken #3.mp4", "missing.mp4"
# The file of each video and its class.
VIDEOS = {
    "<b>bold 100%.mp4": 0,
    "q?=1&b #2.mp4": 0,
    "ünï 日本.mp4": 1,
    SPOILT: 1,
    "plain.mp4": 1,
    "short.mp4": 2,
    MISSING: 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set of data=csv in which one video is broken, one is missing, and one class has none."""
    folder = tmp_path_factory.mktemp("videos & more")
    for number, name in enumerate(VIDEOS):
        write_video(folder / name, moving_square(3 if name == "short.mp4" else 20 + number, height=48, width=64))
    (folder / SPOILT).write_bytes(b"no video")
    (folder / MISSING).unlink()
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    rows = "".join(f'"{name}",{label}\n' for name, label in VIDEOS.items())
    (folder / "list.csv").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture
def data(folder) -> list[str]:
    """The choices of this data set."""
    choices = ["data=csv", f'data.root="{folder}"', "data.train_list=list.csv", "data.val_list=list.csv"]
    return [*choices, "data.labels=classes.txt", "data.size=32", "--workers", "1"]


@pytest.fixture
def in_this_process(monkeypatch):
    """Previews are made here, one after the other."""

    def work(function, items, path_of, processes, seconds):
        for item in items:
            try:
                yield item, function(item)
            except VideoError as error:
                yield item, error

    monkeypatch.setattr(previews, "work", work)
    monkeypatch.setattr(previews.torch, "set_num_threads", lambda count: None)


def results(path: Path, names: list[str], labels: list[int], predicted: list[int], confident: list[float]) -> Path:
    """A folder of an evaluation with these predictions."""
    logits = np.zeros((len(names), len(CLASSES)), dtype=np.float32)
    logits[np.arange(len(names)), predicted] = confident
    evaluations.write(path, Predictions(names, np.array(labels), logits, CLASSES))
    return path


def frames_of(file: Path) -> list[np.ndarray]:
    """The frames of an animated WebP."""
    image = Image.open(io.BytesIO(file.read_bytes()))
    frames = []
    for number in range(image.n_frames):
        image.seek(number)
        frames.append(np.asarray(image.convert("RGB")))
    return frames


def test_a_data_set_is_shown(rubiks_command, data, tmp_path, browser):
    present = [name for name in VIDEOS if name not in (SPOILT, MISSING)]
    labels = [VIDEOS[name] for name in present]
    wrong = results(tmp_path / "results", present, labels, [0, 2, 0, 1, 1], [1.0, 2, 5, 3, 4])
    out = tmp_path / "out put"
    status, printed, err = rubiks_command("browse", *data, "--errors", wrong, "--augmented", "--out", out)
    assert (status, printed) == (0, f"Page in {out / 'index.html'}\n")
    assert "6 videos of 4 classes, 1 missing" in err

    for width, dark in ((390, True), (1280, False)):
        page = browser.open(out / "index.html", width, dark=dark)
        assert page.texts("h1") == ["csv, validation videos"]
        assert page.texts(".subtitle") == ["6 videos of 4 classes, 0 to 3 each; 1 more is missing"]
        assert page.texts("aside li bdi") == CLASSES
        assert page.texts("aside li .number") == ["2", "3", "1", "0"]
        assert page.texts("section h2 bdi") == CLASSES
        shown = page.texts("[data-class] > .previews:first-of-type li > div:last-child")
        assert shown == [name for name in VIDEOS if name != MISSING]
        (unreadable,) = page.texts("#class-1 > .previews:first-of-type .unreadable")
        assert unreadable.startswith("cannot be read:")
        # The most confident mistakes first.
        names = ["ünï 日本.mp4", "short.mp4", "q?=1&b #2.mp4"]
        assert page.texts("#suspects li > div:last-child") == names
        assert page.texts("#suspects li b") == [CLASSES[label] for label in (0, 1, 2)]
        assert page.texts("#suspects li > div:nth-of-type(1)") == [
            f"labelled {CLASSES[VIDEOS[name]]}" for name in names
        ]
        page.click("details.warning summary")
        assert any(text.startswith(f"{SPOILT}: ") for text in page.texts("details.warning li"))

        # Every picture is there, from a file in the folder, and nothing else is asked for.
        page.run("document.querySelectorAll('img').forEach((image) => image.loading = 'eager')")
        sizes = page.run(
            "Promise.all([...document.images].map(async (i) => (await i.decode(), [i.naturalWidth, i.naturalHeight])))"
        )
        assert (
            sizes
            == [[64, 48]] * 3
            + [[64, 48]] * 2
            + [[32, 32]] * 4
            + [[64, 48]] * 2
            + [[32, 32]] * 4
            + [[64, 48]]
            + [[32, 32]] * 4
        )
        inside = (out / "previews").as_uri() + "/"
        assert [problem for problem in page.problems() if not problem.startswith(inside)] == []

        page.type("#search", "50% LEFT")
        assert page.texts("section h2 bdi") == ["left #1 50%"]
        assert page.texts("#found") == ["1 of 4"]
    assert len(list((out / "previews").glob("*"))) == 20


def test_a_preview_shows_frames_from_the_whole_video(rubiks_command, data, folder, tmp_path, in_this_process):
    status, _, err = rubiks_command("browse", *data, "--per-class", 9, "--out", tmp_path / "out")
    assert status == 0, err
    files = sorted((tmp_path / "out" / "previews").glob("*"))
    for name, file in zip([name for name in VIDEOS if name not in (SPOILT, MISSING)], files, strict=True):
        whole = decode_in_order(folder / name)
        expected = [whole[int((part + 0.5) * len(whole) / 8)] for part in range(8)] if len(whole) > 8 else whole
        found = frames_of(file)
        assert len(found) == len(expected)
        for frame, true in zip(found, expected, strict=True):
            assert abs(frame.astype(int) - true).mean() < 12  # the picture is compressed


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 301])
def test_frames_are_spread(length):
    (found,) = Spread().frame_indices(length, np.random.default_rng(0))
    assert found.tolist() == sorted({int((part + 0.5) * length / 8) for part in range(8)})


def test_training_views_are_those_of_the_first_epochs(monkeypatch, folder, tmp_path, in_this_process):
    views = TrainingViews(4, 32, (1, 0.75), flip=[1, 0, 2, 3], augment=Augment(color_jitter=0.5, random_erasing=0.5))
    names = [name for name in VIDEOS if name not in (SPOILT, MISSING)]
    records = [VideoRecord(str(folder / name), VIDEOS[name], listed=name) for name in names]
    made = []
    monkeypatch.setattr(previews, "animation", lambda frames: made.append(frames) or b"")
    chosen = {0: [records[1]], 1: [records[2]]}
    contents = browse.Contents("a title", CLASSES, records, shown=chosen, training=views)
    browse.write(tmp_path / "out", contents, "pyav", 7, 1, 60)
    dataset = VideoDataset(records, views, 7, "pyav")
    assert len(made) == contents.previews == 2 + 2 * browse.VIEWS
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    exchanged = 0
    for number, index in enumerate((1, 2)):
        for epoch in range(browse.VIEWS):
            item = dataset[epoch, index, 0]
            assert made[2 + number * browse.VIEWS + epoch].equal(item["views"][0])
            exchanged += item["label"] != [records[index].label]
    assert 0 < exchanged < 2 * browse.VIEWS
    assert page.count("mirrored: ") == exchanged


def test_videos_of_a_class_are_spread_over_the_list_and_classes_take_turns():
    records = [VideoRecord(f"{number}", number % 3 if number < 30 else 7) for number in range(31)]

    def chosen(per_class: int, limit: int) -> dict[int, list[int]]:
        found = browse.choose(records, per_class, limit)
        return {label: [int(record.path) for record in own] for label, own in found.items()}

    assert chosen(2, 100) == {0: [0, 15], 1: [1, 16], 2: [2, 17], 7: [30]}
    assert chosen(3, 8) == {0: [0, 9, 18], 1: [1, 10], 2: [2, 11], 7: [30]}
    assert chosen(4, 2) == {0: [0], 1: [1]}
    assert chosen(1, 100) == {0: [0], 1: [1], 2: [2], 7: [30]}
    assert {label: len(own) for label, own in chosen(50, 1000).items()} == {0: 10, 1: 10, 2: 10, 7: 1}


def test_the_limit_is_said_and_holds(rubiks_command, data, tmp_path, in_this_process):
    out = tmp_path / "out"
    assert rubiks_command("browse", *data, "--limit", 2, "--out", out)[0] == 0
    assert len(list((out / "previews").glob("*"))) == 2
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("--limit was reached") == 1


def test_file_names_that_are_not_text(rubiks_command, tmp_path, in_this_process):
    name = b"\xff <i>.jpeg".decode(errors="surrogateescape")
    for split in ("train", "val"):
        for own in ("a", "b"):
            (tmp_path / split / own).mkdir(parents=True)
            Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / split / own / name, "JPEG")
    choices = ("data=images", f"data.root={tmp_path}", "data.num_classes=2", "--workers", 1)
    assert rubiks_command("browse", *choices, "--out", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out" / "previews").glob("*"))) == 2
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "\\udcff &lt;i&gt;.jpeg" in page


# ---- the folder


def test_a_second_run_replaces_the_first_and_an_interruption_leaves_no_page(
    rubiks_command, data, tmp_path, monkeypatch, in_this_process
):
    out = tmp_path / "out"
    assert rubiks_command("browse", *data, "--out", out)[0] == 0
    assert len(list((out / "previews").glob("*"))) == 5
    (out / "notes.txt").write_text("of the user")
    assert rubiks_command("browse", *data, "--per-class", 1, "--out", out)[0] == 0
    assert len(list((out / "previews").glob("*"))) == 3
    assert (out / "notes.txt").read_text() == "of the user"

    write = previews.write_atomically

    def interrupted(path: Path, *others) -> None:
        write(path, *others)
        raise KeyboardInterrupt

    monkeypatch.setattr(previews, "write_atomically", interrupted)
    status, _, err = rubiks_command("browse", *data, "--out", out)
    assert (status, err.splitlines()[-1]) == (130, "Interrupted")
    assert sorted(path.name for path in out.iterdir()) == [browse.MARK, "notes.txt", "previews"]
    monkeypatch.setattr(previews, "write_atomically", write)
    assert rubiks_command("browse", *data, "--out", out)[0] == 0
    assert set(re.findall(r"previews/\d+\.webp", (out / "index.html").read_text(encoding="utf-8"))) == {
        f"previews/{path.name}" for path in (out / "previews").iterdir()
    }


def test_other_folders_are_refused(rubiks_command, data, tmp_path):
    (tmp_path / "previews").mkdir()
    kept = tmp_path / "previews" / "mine.webp"
    kept.write_bytes(b"mine")
    status, _, err = rubiks_command("browse", *data, "--out", tmp_path)
    assert status == 2
    assert f"{tmp_path} is not empty, and not from rubiks browse" in err
    assert kept.read_bytes() == b"mine"
    assert_rejected(lambda: browse.check_folder(kept), "is a file")


# ---- what is refused


def test_wrong_words_are_one_message(rubiks_command, data, tmp_path):
    present = [name for name in VIDEOS if name not in (SPOILT, MISSING)]
    labels = [VIDEOS[name] for name in present]
    others = results(tmp_path / "others", ["x.mp4"], [0], [1], [1.0])
    changed = results(tmp_path / "changed", present, [1, *labels[1:]], labels, [1.0] * 5)
    for words, message in (
        (("--per-class", 0), "--per-class must be at least 1, got 0"),
        (("--limit", -3), "--limit must be at least 1, got -3"),
        (("--errors", tmp_path / "nothing"), "there is no"),
        (("--errors", others), "has no prediction for any video of the val list, its first video is x.mp4"),
        (("--errors", changed), "the list has changed"),
    ):
        status, _, err = rubiks_command("browse", *words, *data[:-2], "--out", tmp_path / "out")
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err
    assert not (tmp_path / "out").exists()


def test_all_right_is_said(rubiks_command, data, tmp_path, in_this_process):
    present = [name for name in VIDEOS if name not in (SPOILT, MISSING)]
    labels = [VIDEOS[name] for name in present]
    right = results(tmp_path / "right", present, labels, labels, [1.0] * 5)
    assert rubiks_command("browse", *data, "--errors", right / "predictions.csv", "--out", tmp_path / "out")[0] == 0
    assert "The network was right about every video." in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
