"""report.html in a browser: it is complete in itself, shows the numbers of results.json, and everything moves."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import time
from pathlib import Path

import evaluations
import forked
import numpy as np
import pytest
import torch
from commands import SMALL_RUNS, commands_in

from rubiks import RubiksNet
from rubiks.data import builtin
from rubiks.evaluation import report, results

pytestmark = [pytest.mark.slow, SMALL_RUNS, pytest.mark.usefixtures("small_network")]

LARGEST = 15_000_000  # bytes
SIZES = [(390, False), (1440, False), (390, True), (1440, True)]
HOSTILE = ['</script><script>document.title="gone"</script>', "'quoted\" & <b>bold</b>", "‏ימין לשמאל", "長い名前" * 30]
QUICK = ("data.size=32", "data.num_frames=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_network) -> Path:
    """A small training's folder with its evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    builtin.generate(folder / "data", "textured", 24, 16, 0, progress=False)
    options = ("data.level=textured", f"data.root={folder / 'data'}", "data.train_videos=24", "data.val_videos=16")
    with commands_in(folder) as commands:
        commands.train(
            *options, *QUICK, "recipe.epochs=2", "recipe.batch_size=8", "trainer.log_every_n_steps=1", "run=first"
        )
        out = commands.evaluate(*options, *QUICK, "run=first", "protocol=two_clip", "temporal=true")
    assert "Report in outputs/first/report.html\n" in out
    return folder / "outputs/first"


@pytest.fixture(scope="module")
def many(tmp_path_factory, small_network) -> Path:
    """The folder of an evaluation of a random network on 120 videos of 174 classes."""
    folder = tmp_path_factory.mktemp("many")
    builtin.generate(folder / "data", "plain", 8, 120, 0, progress=False)
    videos = sorted((folder / "data").rglob("*.webm"))[-120:]
    classes = [*HOSTILE, *(f"Pretending to do something number {number} with something" for number in range(170))]
    labels = np.random.default_rng(0).integers(174, size=len(videos))
    (folder / "labels.txt").write_text("\n".join(classes) + "\n")
    (folder / "list.csv").write_text("".join(f"{path},{label}\n" for path, label in zip(videos, labels, strict=True)))
    torch.manual_seed(0)
    RubiksNet("tiny", 174, num_frames=4).save_pretrained(folder / "net.pth.tar")
    with commands_in(folder) as commands:
        commands.evaluate(
            "data=csv", "data.val_list=list.csv", "data.labels=labels.txt", "ckpt=net.pth.tar", *QUICK, "run=many"
        )  # fmt: skip
    return folder / "outputs/many"


@pytest.fixture(params=["trained", "many"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_it_is_complete_in_itself_at_any_size(width, dark, folder, browser):
    path = folder / "report.html"
    assert path.stat().st_size < LARGEST
    assert browser.open(path, width, dark=dark).problems() == []
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", path.read_text())


def test_its_numbers_are_those_of_the_files(folder, browser):
    numbers = json.loads((folder / "results.json").read_text())
    shown = browser.open(folder / "report.html")
    for name in ("top1", "top5", "mean_class_accuracy", "calibration_error"):
        assert shown.texts(f"[data-number={name}]") == [f"{numbers[name]:.2f}%"]
    assert shown.texts("[data-number=videos]") == [str(numbers["videos"])]
    low, high = numbers["intervals"]["top1"]
    text = " ".join(shown.texts("main"))
    assert f"95% interval {low:.2f} to {high:.2f}" in text
    for top1 in numbers.get("temporal", {}).values():
        assert f"{top1:.2f}%" in text
    with open(folder / "per_class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert shown.texts("#class-table summary") == [row["class"].strip() for row in rows]
    for column, name in enumerate(("support", "recall", "precision", "f1"), 2):
        cells = shown.texts(f"#class-table tbody td:nth-child({column})")
        wanted = [row[name] for row in rows]
        if name != "support":
            wanted = [f"{float(cell):.1f}%" if cell else "–" for cell in wanted]  # noqa: RUF001
        assert cells == wanted
    for value in (numbers["checkpoint"], numbers["checkpoint_sha256"], numbers["list_sha256"], numbers["device"]):
        assert value in text


def test_nothing_of_the_data_is_taken_for_html(many, browser):
    shown = browser.open(many / "report.html")
    assert shown.run("document.title").startswith("rubiks3d tiny")
    assert [text.strip() for text in shown.texts("#class-table summary")[:4]] == HOSTILE
    assert shown.run("document.querySelectorAll('main script').length") == 1  # the matrix's data
    assert shown.run("JSON.parse(document.getElementById('matrix-data').textContent).classes.slice(0, 4)") == HOSTILE


def test_the_table_sorts_searches_and_opens(many, browser):
    shown = browser.open(many / "report.html")
    shown.click("#class-table thead th:nth-child(2) button")
    support = [int(text) for text in shown.texts("#class-table tbody td:nth-child(2)")]
    assert support == sorted(support, reverse=True)
    shown.type("[data-search=class-table]", "99 pretending")
    assert shown.texts("#class-table summary") == ["Pretending to do something number 99 with something"]
    shown.type("[data-search=class-table]", "")
    shown.click("#class-table summary")
    found = results.read(many)
    name = shown.texts("#class-table summary")[0]
    label = [own.name for own in found.classes].index(name)
    details = shown.texts("#class-table details[open]")[0]
    assert f"{found.confusion[label, label]} of {support[0]} videos recognised" in details
    for other in np.flatnonzero(found.confusion[label]):
        assert other == label or f"{found.confusion[label, other]} × {found.classes[other].name}" in details  # noqa: RUF001


@pytest.mark.parametrize("width", [390, 1440])
def test_the_matrix_shows_a_cell_and_zooms(width, many, browser):
    shown = browser.open(many / "report.html", width)
    found = results.read(many)
    names = [own.name for own in found.classes]
    shown.run("document.querySelector('#matrix-order').value = 'label'")
    shown.run("document.querySelector('#matrix-order').dispatchEvent(new Event('change'))")

    def press(*keys: str) -> str:
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                shown.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
        return shown.texts("#matrix-cell")[0]

    shown.run("document.getElementById('matrix-canvas').focus()")
    label, predicted = next(
        (row, column) for row, column in np.argwhere(found.confusion).tolist() if row > 3 and column > 3
    )
    text = press(*["ArrowDown"] * (label + 1), *["ArrowRight"] * predicted)
    share = found.confusion[label, predicted] / found.confusion[label].sum()
    assert text.startswith(f"{names[label]}: {found.confusion[label, predicted]} of {found.confusion[label].sum()}")
    assert f"({share:.1%})" in text
    assert text.endswith(names[predicted] if label != predicted else "recognised")

    box = shown.box("#matrix-canvas")
    before = shown.screenshot(**box)
    shown.click("[data-zoom='1.6']")
    assert shown.texts("#matrix-cell") == [text]
    assert shown.screenshot(**box) != before
    shown.click("[data-zoom='0']")
    assert shown.screenshot(**box) == before
    place = {"x": box["x"] + box["width"] * 0.7, "y": box["y"] + box["height"] * 0.7}
    shown.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    pointed = shown.texts("#matrix-cell")
    assert pointed != [text]
    shown.call("Input.dispatchMouseEvent", type="mouseWheel", deltaX=0, deltaY=-600, **place)
    shown.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    assert shown.texts("#matrix-cell") == pointed  # what lies under the pointer stays there
    assert shown.screenshot(**box) != before
    assert shown.problems() == []


def test_fingers_zoom_the_matrix(trained, browser):
    shown = browser.open(trained / "report.html", 390)
    box = shown.box("#matrix-canvas")
    x, y = box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6

    def touch(kind: str, *apart: float) -> None:
        points = [{"x": x + shift, "y": y, "id": number} for number, shift in enumerate(apart)]
        shown.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    touch("touchStart", 0)
    touch("touchEnd")
    assert " of " in shown.texts("#matrix-cell")[0]
    before = shown.screenshot(**box)
    touch("touchStart", -20, 20)
    for apart in (30, 40, 60):
        touch("touchMove", -apart, apart)
    touch("touchEnd")
    assert shown.screenshot(**box) != before
    assert shown.problems() == []


def test_previews_move_and_maps_lie_over_them(trained, browser):
    shown = browser.open(trained / "report.html")
    moving = ".previews li:first-child img.plain"
    box = shown.box(moving)
    seen = set()
    for _ in range(20):
        seen.add(shown.screenshot(**box))
        time.sleep(0.1)
    assert len(seen) > 1
    count = len(shown.texts(".previews img"))
    assert count == len(json.loads((trained / "previews/previews.json").read_text())["previews"]) >= 12
    shown.click("#maps")
    assert len(shown.texts(".previews img.map")) == count
    assert shown.texts(".previews img.plain") == []
    assert shown.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_it_prints(trained, browser):
    shown = browser.open(trained / "report.html")
    shown.call("Emulation.setEmulatedMedia", media="print")
    assert shown.texts("nav, input[type=search], .buttons") == []
    assert len(shown.texts("#class-table tbody tr")) == 14
    assert shown.call("Page.printToPDF")["data"]


# ---- sections of a training run; odd evaluations


def test_a_run_shows_its_shifts_and_curves(trained, browser):
    shown = browser.open(trained / "report.html")
    assert shown.texts("#shifts h3") == ["Time", "Height", "Width"]
    assert [text.partition(",")[0] for text in shown.texts("#curves h3")] == [
        "Loss",
        "Validation accuracy",
        "Learning rate",
    ]
    bars = shown.run(
        "[...document.querySelectorAll('#shifts figure')].map((one) => one.querySelectorAll('rect').length)"
    )
    assert bars == [5 * 41] * 3


def test_without_a_report_none_is_left(trained, tmp_path):
    folder = tmp_path / "outputs/first"
    shutil.copytree(trained, folder)
    data = trained.parents[1] / "data"
    with commands_in(tmp_path) as commands:
        out = commands.evaluate(
            "data.level=textured", f"data.root={data}", "data.train_videos=24", "data.val_videos=16", *QUICK,
            "run=first", "report=false",
        )  # fmt: skip
    assert "Report" not in out
    assert {path.name for path in folder.iterdir()}.isdisjoint({"report.html", "previews", "shifts.json"})


def test_an_evaluation_that_is_stopped_while_it_reports_keeps_its_results(trained, tmp_path, monkeypatch):
    def wait(*_) -> None:
        print("inside", flush=True)
        time.sleep(60)

    monkeypatch.setattr("rubiks.evaluation.previews.write", wait)
    data = trained.parents[1] / "data"
    process = forked.start(
        tmp_path, "eval", "data.workers=0", "data.level=textured", f"data.root={data}", "data.train_videos=24",
        "data.val_videos=16", *QUICK, f"ckpt={trained}", "run=stopped",
    )  # fmt: skip
    next(line for line in process.stdout if line.startswith("inside"))
    process.send_signal(signal.SIGTERM)
    status, _, err = forked.end(process, timeout=60)
    assert (status, err) == (
        143,
        "interrupted by SIGTERM: the results are written, the report is not: rubiks report outputs/stopped writes it\n",
    )
    report.write(tmp_path / "outputs/stopped")


def test_an_unreadable_video_is_listed(trained, tmp_path, browser):
    videos = sorted((trained.parents[1] / "data").rglob("*.webm"))[:5]
    classes = [own.name for own in results.read(trained).classes]
    (tmp_path / "labels.txt").write_text("\n".join(classes))
    (tmp_path / "broken.webm").write_text("no video")
    lines = [f"{path},{number % 14}\n" for number, path in enumerate([*videos, tmp_path / "broken.webm"])]
    (tmp_path / "list.csv").write_text("".join(lines))
    with commands_in(tmp_path) as commands:
        commands.evaluate(
            "data=csv", "data.val_list=list.csv", "data.labels=labels.txt", "data.on_error=skip", "data.max_bad=0.5",
            f"ckpt={trained}", *QUICK, "run=skipping", "frame_order=reversed",
        )  # fmt: skip
    shown = browser.open(tmp_path / "outputs/skipping/report.html")
    assert "1 of 6 left out" in " ".join(shown.texts("main"))
    assert "reversed in time: this is not a score" in shown.texts(".warning")[0]
    assert shown.texts("summary")[0] == "1 video was not scored"
    shown.click("summary")
    assert "broken.webm" in shown.texts("details[open] li")[0]
    assert shown.problems() == []


@pytest.mark.parametrize(
    ("classes", "videos", "right"),
    [(["only"], 3, 1.0), (["a", "b"], 2, 0.0), (["a", "b"], 2, 1.0), (HOSTILE, 5, 0.5), (["", " ", "c"], 9, 0.5)],
)
def test_odd_evaluations_look_right(classes, videos, right, tmp_path, browser):
    evaluations.write(tmp_path, evaluations.random_predictions(classes, videos, right))
    path = report.write(tmp_path)
    for width, dark in SIZES:
        shown = browser.open(path, width, dark=dark)
        assert shown.problems() == []
    text = " ".join(shown.texts("main"))
    assert ("No video was taken for another class." in text) == (right == 1.0)
    assert "There are no previews of this evaluation." in text
    assert not re.search(r"nan|None|undefined|Infinity", text)


def test_400_classes_of_20_000_videos(tmp_path, browser):
    names = [f"Class {number} of a long list with a rather long name" for number in range(400)]
    evaluations.write(tmp_path, evaluations.random_predictions(names, 20_000, 0.3))
    path = report.write(tmp_path)
    assert path.stat().st_size < LARGEST / 3
    text = path.read_text()
    assert "v19999.mp4" not in text  # not every prediction
    shown = browser.open(path, 390)
    assert len(shown.texts("#class-table summary")) == 400
    assert len(shown.texts("#pairs tbody tr")) == 20
    assert shown.problems() == []


def test_a_published_score_stands_beside(tmp_path, browser):
    same = {"data": "ssv2", "tier": "tiny", "variant": "rubiks3d", "protocol": "two_clip"}
    predictions = evaluations.random_predictions(["a", "b"], 40)
    numbers = evaluations.write(tmp_path, predictions, **same)
    text = " ".join(browser.open(report.write(tmp_path)).texts("main"))
    assert f"published 56.65%, difference {numbers['top1'] - 56.65:+.2f}" in text
    assert f"published 84.11%, difference {numbers['top5'] - 84.11:+.2f}" in text
    for other in ({"data": "mine"}, {"protocol": "custom"}, {"frame_order": "reversed"}):
        evaluations.write(tmp_path, predictions, **same | other)
        assert "published" not in report.write(tmp_path).read_text()
