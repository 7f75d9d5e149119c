"""The built-in data set: determinism, resumption, annotation format, content of the clips, and errors."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import decord
import numpy as np
import pytest
from conftest import ROOT

from rubiks.data import actions, builtin_clips, builtin_workers, scenes
from rubiks.data.builtin import LEVELS, class_names, generate
from rubiks.errors import InputError

VIDEOS = "20bn-something-something-v2"
TRAIN, VAL = 17, 9  # a few more than the eight classes, and not a multiple of them


# A script without a main guard, as from a notebook or `python -c`. The packages' own __init__ files are skipped: they
# import PyTorch, which takes seconds and is not needed here.
SCRIPT = f"""
import resource, sys, types
for name, folder in (("rubiks", {str(ROOT / "rubiks")!r}), ("rubiks.data", {str(ROOT / "rubiks/data")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from rubiks.data.builtin import generate
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("made"), "plain", TRAIN, VAL, workers=1, progress=False)


def test_same_bytes_whatever_the_number_of_processes(made: Path, tmp_path: Path) -> None:
    other = generate(tmp_path, "plain", TRAIN, VAL, workers=2, progress=False)
    assert other.name == made.name == f"plain-{TRAIN}+{VAL}-seed0"
    assert contents(other) == contents(made)


def test_another_seed_gives_other_clips(made: Path, tmp_path: Path) -> None:
    other = generate(tmp_path, "plain", 8, 8, seed=1, workers=1, progress=False)
    clips = [set(contents(folder / VIDEOS).values()) for folder in (made, other)]
    assert not clips[0] & clips[1]


def test_training_and_validation_clips_differ(made: Path) -> None:
    clips = contents(made / VIDEOS)
    assert len(set(clips.values())) == len(clips) == TRAIN + VAL


def test_annotations_are_in_the_official_format(made: Path) -> None:
    names = json.loads((made / "labels.json").read_text())
    assert list(names.values()) == [str(i) for i in range(8)]
    assert names["Moving something from left to right"] == "0"
    ids = []
    for split, count in (("train", TRAIN), ("validation", VAL)):
        entries = json.loads((made / f"{split}.json").read_text())
        assert len(entries) == count
        for entry in entries:
            assert set(entry) == {"id", "label", "template", "placeholders"}
            assert entry["template"].replace("[", "").replace("]", "") in names
            filled = entry["template"].lower().replace("[something]", entry["placeholders"][0])
            assert entry["label"] == filled
            ids.append(entry["id"])
        balance = Counter(entry["template"] for entry in entries)
        assert set(balance) == set(class_names("plain"))
        assert max(balance.values()) - min(balance.values()) <= 1
        in_order = [class_names("plain")[i % 8] for i in range(count)]
        assert [entry["template"] for entry in entries] != in_order
    assert len(set(ids)) == len(ids)
    assert {f"{i}.webm" for i in ids} == set(os.listdir(made / VIDEOS))
    assert "seed 0" in (made / "README.txt").read_text()


def test_two_placeholders_in_order() -> None:
    label = class_names("textured").index("Putting [something] onto [something]")
    looks = scenes.cast(np.random.default_rng(3), "textured", label)
    assert len(looks) == 2
    assert looks[0] != looks[1]
    assert len(scenes.cast(np.random.default_rng(3), "textured", 0)) == 1


def test_files_hold_the_drawn_frames(made: Path) -> None:
    plan = builtin_clips.Plan("plain", 0, TRAIN, VAL)
    templates = {
        e["id"]: e["template"] for s in ("train", "validation") for e in json.loads((made / f"{s}.json").read_text())
    }
    for clip in plan.clips():
        frames = scenes.draw(plan.rng(clip), "plain", clip.label)
        reader = decord.VideoReader(str(made / VIDEOS / f"{clip.video_id}.webm"))
        assert 24 <= len(frames) <= 72
        assert len(reader) == len(frames)
        assert reader.get_avg_fps() == pytest.approx(12, rel=0.02)
        decoded = reader.get_batch(range(len(reader))).asnumpy()
        assert decoded.shape == frames.shape
        assert min(decoded.shape[1:3]) == 80
        assert np.abs(decoded.astype(int) - frames).mean() < 6
        assert templates[str(clip.video_id)] == class_names("plain")[clip.label]


def test_interrupted_generation_goes_on(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = generate(tmp_path, "plain", TRAIN, VAL, workers=1)
    assert f"Making the built-in data set (plain, {TRAIN + VAL} videos) in {folder}" in capsys.readouterr().out
    for name in ("labels.json", "train.json", "validation.json"):
        (folder / name).unlink()
    for number in (2, 5, 20):
        (folder / VIDEOS / f"{number}.webm").unlink()
    (folder / VIDEOS / "7.webm").write_bytes(b"")  # as a power cut may leave it
    (folder / VIDEOS / f"{builtin_clips.TEMPORARY}0123").write_bytes(b"half")
    kept = (folder / VIDEOS / "1.webm").stat().st_mtime_ns
    assert generate(tmp_path, "plain", TRAIN, VAL, workers=1, progress=False) == folder
    assert contents(folder) == contents(made)
    assert (folder / VIDEOS / "1.webm").stat().st_mtime_ns == kept


def test_finished_data_set_stays_untouched(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made, *made.rglob("*"))}
    assert generate(made.parent, "plain", TRAIN, VAL) == made
    assert {path: path.stat().st_mtime_ns for path in (made, *made.rglob("*"))} == before
    assert capsys.readouterr().out == ""


def test_a_temporary_file_taken_away_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, calls = os.replace, []

    def taken_once(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 1:
            builtin_clips.remove_temporary(tmp_path)  # what a second process does when it starts
        replace(source, target)

    monkeypatch.setattr(os, "replace", taken_once)
    builtin_clips.write(tmp_path / "file", b"whole")
    assert contents(tmp_path) == {"file": b"whole"}
    assert len(calls) == 2


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_quickly_and_leaves_whole_clips(tmp_path: Path) -> None:
    script = f"{SCRIPT}generate({str(tmp_path)!r}, 'plain', 3000, 400, workers=1)"
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    videos = tmp_path / "plain-3000+400-seed0" / VIDEOS
    deadline = time.monotonic() + 60
    while not list(videos.glob("*.webm")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert errors.count("Traceback") == 1  # the caller's own: the workers say nothing
    names = sorted(path.name for path in videos.iterdir())
    time.sleep(0.3)
    assert sorted(path.name for path in videos.iterdir()) == names  # no worker continues
    assert all(name.endswith(".webm") for name in names)
    for path in list(videos.iterdir())[:20]:
        assert len(decord.VideoReader(str(path))) >= 24


@pytest.mark.parametrize("level", LEVELS)
def test_second_class_of_a_pair_is_the_first_reversed(level: str) -> None:
    for first in range(0, len(class_names(level)), 2):
        forwards, backwards = (scenes.draw(np.random.default_rng(first), level, label) for label in (first, first + 1))
        assert np.array_equal(forwards[::-1], backwards)
        assert not np.array_equal(forwards, backwards)
        assert min(forwards.shape[1:3]) == {"plain": 80, "textured": 128}[level]


def ends(label: int, seed: int) -> tuple[list[actions.Sprite], np.ndarray, np.ndarray]:
    """The actors of a textured clip, and the last one's path and all its positions (frames, 2), in short sides."""
    rng = np.random.default_rng([label, seed])
    looks = scenes.cast(rng, "textured", label)
    p = scenes._progress(rng, 48)
    assert (p[0], p[-1]) == (0, 1)
    sprites = actions.PAIRS[label // 2].draw(rng, p, looks)
    places = np.stack([np.broadcast_to(sprites[-1].x, 48), np.broadcast_to(sprites[-1].y, 48)], -1)
    return sprites, places[-1] - places[0], places


@pytest.mark.parametrize("label", range(0, 14, 2))
def test_actions_are_large_and_stay_in_the_central_square(label: int) -> None:
    name = class_names("textured")[label]
    for seed in range(100):
        sprites, way, places = ends(label, seed)
        for sprite in sprites:
            for track in (sprite.x, sprite.y):
                assert np.max(np.abs(track) + (0 if sprite.half else sprite.radius)) < 0.5
        if "left to right" in name:
            assert 0.34 < way[0] < 0.8
            assert abs(way[1]) < 0.2
        elif name.endswith("up"):
            assert -0.8 < way[1] < -0.34
            assert abs(way[0]) < 0.2
        elif "closer" in name:
            assert np.max(sprites[0].radius) >= 2 * np.min(sprites[0].radius)
        elif "clockwise" in name:
            side = np.diff(places, axis=0)
            turned = np.sum(side[:-1, 0] * side[1:, 1] - side[:-1, 1] * side[1:, 0])
            assert turned > 0  # clockwise on a screen, where y points down
            assert np.ptp(places, axis=0).max() > 0.35
        elif "onto" in name:
            base = np.array([sprites[0].x, sprites[0].y])
            assert np.hypot(*(places[-1] - base)) < 0.1 < 0.35 < np.hypot(*(places[0] - base))
        elif "Opening" in name:
            apart = [np.hypot(sprites[1].x[i] - sprites[0].x[i], sprites[1].y[i] - sprites[0].y[i]) for i in (0, -1)]
            assert apart[0] < 0.01
            assert apart[1] > 0.2
        else:
            assert np.array_equal(np.asarray(sprites[0].opacity)[[0, -1]], [0, 1])


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("data.level", {"level": "fancy"}),
        ("data.train_videos", {"train_videos": 7}),
        ("data.train_videos", {"level": "textured", "train_videos": 13}),
        ("data.train_videos", {"train_videos": 100.5}),
        ("data.val_videos", {"val_videos": 7}),
        ("data.val_videos", {"val_videos": -1}),
        ("seed", {"seed": -1}),
        ("workers", {"workers": 0}),
    ],
)
def test_bad_arguments(key: str, arguments: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^{key}: expected .*, got {list(arguments.values())[-1]!r}"):
        generate(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_unknown_level_has_no_classes() -> None:
    with pytest.raises(InputError, match=r"data\.level"):
        class_names("fancy")


def test_root_that_is_a_file(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(InputError, match=rf"^data\.root: .*cannot write .*{root}"):
        generate(root, "plain", 8, 8, progress=False)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def fill_up(path: Path, content: bytes) -> None:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(InputError, match=rf"data\.root: .*cannot write 4\.webm in {tmp_path}: the disk is full"):
        builtin_clips.write(tmp_path / "4.webm", b"video")
    assert not list(tmp_path.iterdir())
    # The videos fit, an annotation file doesn't.
    with pytest.raises(InputError, match=r"cannot write README\.txt in .*: the disk is full"):
        generate(tmp_path, "plain", 8, 8, progress=False)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    assert len(contents(folder)) == 8 + 8
    assert len(contents(generate(tmp_path, "plain", 8, 8, progress=False))) == 8 + 8 + 4


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_write_error_in_the_middle_of_a_video(tmp_path: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
    script = f"{SCRIPT}{limit}generate({str(tmp_path)!r}, 'plain', 100, 100, workers=2)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert re.search(r"InputError: data\.root: .*cannot write \d+\.webm in .*: File too large", ended.stderr)
    assert ended.stderr.count("Traceback") == 1
    (folder,) = tmp_path.iterdir()
    assert all(re.fullmatch(VIDEOS + r"/\d+\.webm", name) for name in contents(folder))


def test_error_in_a_worker_process_reaches_the_caller(tmp_path: Path) -> None:
    plan = builtin_clips.Plan("plain", 0, 8, 8)
    with pytest.raises(InputError, match=rf"data\.root: .*cannot write \d+\.webm in {tmp_path / 'gone'}"):
        builtin_workers.make_in_processes(tmp_path / "gone", plan, 2, lambda: None)
