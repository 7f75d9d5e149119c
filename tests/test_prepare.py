"""`rubiks prepare`: what it writes, and that an interruption leaves no trace."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from fractions import Fraction
from itertools import cycle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from torchvision.transforms.v2 import functional
from videos import decode_in_order, moving_square, real_clip, rotated, write_video

from rubiks.cli import main
from rubiks.data.decode import VideoFile, open_video
from rubiks.data.examine import examine
from rubiks.data.jpegs import JpegVideo
from rubiks.data.manifest import Manifest
from rubiks.data.prepare import Job, prepare, target_name
from rubiks.data.records import VideoRecord
from rubiks.data.sources import CsvLists, FrameLists, Kinetics, SomethingSomethingV2
from rubiks.data.writers import VideoWriter
from rubiks.errors import InputError, VideoError


@pytest.fixture(scope="module", autouse=True)
def _this_package():
    """Worker processes import the tested package, whatever a test's working directory is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield


@pytest.fixture
def rubiks_command(rubiks_command, monkeypatch, tmp_path):
    """Runs `rubiks prepare` in a separate folder; returns its output or its error."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        status, out, err = rubiks_command("prepare", *arguments, "--workers", 1)
        return err if status else out

    return command


def prepared(source, folder, form="jpeg", short_side=256):
    """Prepare one video; returns its record."""
    name = target_name("v.mp4", form)
    manifest = Manifest(folder)
    assert prepare([Job(VideoRecord(str(source), 0), folder / name, name, form, short_side)], manifest, 1, 60) == {}
    entry = manifest.entries[name]
    if form == "frames":
        return VideoRecord(str(folder / name), 0, entry.frames, "{:06d}.jpg")
    return manifest.apply([VideoRecord(str(folder / name), 0)])[0]


def psnr(frames, others):
    return 10 * np.log10(255**2 / np.square(frames.astype(float) - others).mean())


def resized(frames, size):
    """(T, H, W, 3) array resized as training does it."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return functional.resize(images, list(size), antialias=True).permute(0, 2, 3, 1).numpy()


class TestVideos:
    @pytest.mark.parametrize("form", ["jpeg", "h264", "frames"])
    @pytest.mark.parametrize(
        ("clip", "short_side", "size", "least"),
        [
            ("kinetics_demo.mp4", 256, (256, 340), 36),
            ("kinetics_demo.mp4", 128, (128, 170), 34),
            ("ssv2_like.webm", 256, (240, 318), 36),
            ("mpeg4_test.avi", 400, (240, 320), 36),
        ],
    )
    def test_the_same_frames_as_the_source(self, tmp_path, form, clip, short_side, size, least):
        source = real_clip(clip)
        expected = decode_in_order(source)
        record = prepared(source, tmp_path, form, short_side)
        with open_video(record) as video:
            assert len(video) == len(expected)
            indices = [len(expected) - 1, 0, len(expected) // 2, len(expected) // 3]
            frames = video.frames(indices).permute(0, 2, 3, 1).numpy()
        assert frames.shape[1:3] == size
        assert psnr(resized(expected[indices], size), frames) > least

    @pytest.mark.parametrize("form", ["jpeg", "h264"])
    def test_every_frame_is_in_its_place(self, tmp_path, form):
        write_video(tmp_path / "s.mp4", moving_square(40, 96, 128), b_frames=2)
        source = decode_in_order(tmp_path / "s.mp4")
        record = prepared(tmp_path / "s.mp4", tmp_path / "out", form)
        with open_video(record) as video:
            assert isinstance(video, JpegVideo if form == "jpeg" else VideoFile)
            frames = video.frames(range(40)).permute(0, 2, 3, 1).numpy()
        played = decode_in_order(record.path)
        assert np.array_equal(frames, played) or (form == "jpeg" and psnr(frames, played) > 40)
        errors = [[np.square(a.astype(float) - b).mean() for b in source] for a in frames]
        assert np.argmin(errors, axis=1).tolist() == list(range(40))

    def test_turned_as_players_show_the_source(self, tmp_path):
        write_video(tmp_path / "s.mp4", moving_square(9, 96, 128))
        upright = np.rot90(decode_in_order(tmp_path / "s.mp4"), -1, axes=(1, 2))
        (tmp_path / "s.mp4").write_bytes(rotated((tmp_path / "s.mp4").read_bytes()))
        with open_video(prepared(tmp_path / "s.mp4", tmp_path / "out")) as video:
            assert psnr(video.frames(range(9)).permute(0, 2, 3, 1).numpy(), upright) > 32

    @pytest.mark.parametrize("form", ["jpeg", "h264"])
    @pytest.mark.parametrize("colours", [(1, 2), (1, 1), (5, 2)], ids=["bt709", "bt709 limited", "bt601 full"])
    def test_colours_are_read_as_before(self, tmp_path, colours, form):
        space, full = colours
        with av.open(str(tmp_path / "s.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=12, options={"preset": "ultrafast", "crf": "5"})
            stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
            stream.codec_context.colorspace, stream.codec_context.color_range = space, full
            for image in moving_square(8, 96, 128):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        with open_video(prepared(tmp_path / "s.mp4", tmp_path / "out", form)) as video:
            frames = video.frames(range(8)).permute(0, 2, 3, 1).numpy()
        assert psnr(decode_in_order(tmp_path / "s.mp4"), frames) > 32

    @pytest.mark.parametrize(("form", "size"), [("jpeg", (75, 81)), ("h264", (74, 80))])
    def test_odd_sizes(self, tmp_path, form, size):
        write_video(tmp_path / "s.webm", moving_square(5, 75, 81), codec="libvpx-vp9")
        record = prepared(tmp_path / "s.webm", tmp_path / "out", form)
        assert decode_in_order(record.path).shape == (5, *size, 3)
        with open_video(record) as video:
            assert video.frames([0]).shape == (1, 3, *size)

    def test_damaged_videos_are_named_and_not_written(self, tmp_path):
        write_video(tmp_path / "s.mp4", moving_square(40))
        (tmp_path / "s.mp4").write_bytes((tmp_path / "s.mp4").read_bytes()[:-300])
        job = Job(VideoRecord(str(tmp_path / "s.mp4"), 0), tmp_path / "out" / "s.mp4", "s.mp4", "jpeg", 256)
        bad = prepare([job], Manifest(tmp_path / "out"), 1, 60)
        assert list(bad) == [str(tmp_path / "s.mp4")]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["rubiks-manifest.jsonl"]

    def test_a_disk_that_fails_is_not_the_videos_fault(self, tmp_path, monkeypatch):
        write_video(tmp_path / "s.mp4", moving_square(5))
        record = VideoRecord(str(tmp_path / "s.mp4"), 0)
        writer = VideoWriter(tmp_path / "out.mp4", "jpeg", 256)

        class Full:
            def encode(self, frame):
                raise av.OSError(28, "No space left on device")

        monkeypatch.setattr(writer, "_stream", Full())
        with pytest.raises(InputError, match="No space left") as caught:
            examine(record, "s.mp4", writer.add)
        assert not isinstance(caught.value, VideoError)


class TestDataSets:
    """The lists of the new folder give the same videos and labels through the same choices."""

    def test_something_something(self, tmp_path, rubiks_command):
        root, out = tmp_path / "ssv2", tmp_path / "out"
        (root / "20bn-something-something-v2").mkdir(parents=True)
        (root / "labels").mkdir()
        for name in "12":
            path = root / "20bn-something-something-v2" / f"{name}.webm"
            write_video(path, moving_square(9), codec="libvpx-vp9")
        (root / "labels/labels.json").write_text(json.dumps({"Run": "0", "Jump": "1"}))
        (root / "labels/train.json").write_text(json.dumps([{"id": "1", "template": "Jump"}]))
        (root / "labels/validation.json").write_text(json.dumps([{"id": "2", "template": "Run"}]))
        printed = rubiks_command("data=ssv2", f"data.root={root}", "--out", out)
        assert f"data=ssv2 data.root={out}" in printed
        assert "times as fast" in printed
        for split in ("train", "val"):
            before, after = (SomethingSomethingV2(root=str(folder)).records(split)[0] for folder in (root, out))
            assert [(r.name, r.label) for r in after] == [(r.name, r.label) for r in before]
            with open_video(after[0]) as video:
                assert isinstance(video, JpegVideo)
                assert (
                    len(video) == Manifest(out).entries[f"20bn-something-something-v2/{after[0].name}.mp4"].frames == 9
                )

    def test_kinetics(self, tmp_path, rubiks_command):
        root, out = tmp_path / "k400", tmp_path / "out"
        header = "label,youtube_id,time_start,time_end,split\n"
        for split, label, name in (("train", "rock climbing", "a"), ("val", "zumba", "b")):
            (root / split / label).mkdir(parents=True)
            write_video(root / split / label / f"{name}_000001_000011.mp4", moving_square(9))
            (root / f"{split}.csv").write_text(f"{header}{label},{name},1,11,{split}\nzumba,gone,1,11,{split}\n")
        assert f"data=kinetics data.root={out}" in rubiks_command("data=kinetics", f"data.root={root}", "--out", out)
        for split in ("train", "val"):
            (before, gone), (after, _) = (Kinetics(root=str(folder)).records(split) for folder in (root, out))
            assert [(r.name, r.label) for r in after] == [(r.name, r.label) for r in before]
            assert len(gone) == 1

    def test_csv_and_frames(self, tmp_path, rubiks_command):
        root, out, folders, back = (tmp_path / name for name in ("csv", "out", "folders", "back"))
        (root / "sub").mkdir(parents=True)
        write_video(root / "sub" / "a.avi", moving_square(9), codec="mpeg4")
        write_video(tmp_path / "b.mp4", moving_square(6))
        (root / "train.csv").write_text(f"path,label\nsub/a.avi,run\n{tmp_path / 'b.mp4'},jump\ngone.mp4,fly\n")
        (root / "val.csv").write_text("sub/a.avi,jump\n")
        lists = {"train_list": "train.csv", "val_list": "val.csv"}
        choices = ["data=csv", *(f"data.{key}={value}" for key, value in lists.items())]
        assert f"{' '.join(choices)} data.root={out}" in rubiks_command(*choices, f"data.root={root}", "--out", out)
        sources = [CsvLists(root=str(folder), **lists) for folder in (root, out)]
        assert sources[0].classes == sources[1].classes
        before, after = (source.records("train")[0] for source in sources)
        assert [(Path(r.name).stem, r.label) for r in after] == [(Path(r.name).stem, r.label) for r in before]

        # From these to folders of frames, and from those to videos.
        printed = rubiks_command(*choices, f"data.root={root}", "--out", folders, "--form", "frames")
        assert "data=frames data.train_list=train.txt data.val_list=val.txt data.labels=labels.txt" in printed
        assert "'data.pattern=\"{:06d}.jpg\"'" in printed
        frames = FrameLists(root=str(folders), train_list="train.txt", val_list="val.txt", labels="labels.txt")
        assert frames.classes == sources[0].classes
        assert [(r.label, r.num_frames) for r in frames.records("train")[0]] == [(2, 9), (1, 6)]
        printed = rubiks_command(
            "data=frames",
            f"data.root={folders}",
            "data.train_list=train.txt",
            "data.val_list=val.txt",
            "data.labels=labels.txt",
            "--out",
            back,
        )
        assert "data=csv data.train_list=train.csv data.val_list=val.csv data.labels=labels.txt" in printed
        again = CsvLists(root=str(back), train_list="train.csv", val_list="val.csv", labels="labels.txt").records(
            "train"
        )[0]
        assert [(r.label, len(decode_in_order(r.path))) for r in again] == [(2, 9), (1, 6)]

    def test_space_is_told_before_and_advice_can_be_pasted(self, tmp_path, rubiks_command):
        root = tmp_path / "root"
        root.mkdir()
        for name in "abc":
            write_video(root / f"{name}.mp4", moving_square(40, 96, 128), b_frames=2)
        (root / "train.csv").write_text("a.mp4,2\nb.mp4,0\n")
        (root / "val.csv").write_text("c.mp4,1\n")
        choices = ("data=csv", f"data.root={root}", "data.train_list=train.csv", "data.val_list=val.csv")
        for form in ("jpeg", "frames"):
            out = rubiks_command(*choices, "--form", form, "--out", tmp_path / form)
            (factor,) = re.search(
                r"^JPEG frames take about ([\d.]+) times the space of these videos \(measured on 3\), "
                r"[\d.]+ GB instead of [\d.]+ GB; the disk of .* has [\d.]+ GB free. --form h264 takes less$",
                out,
                re.MULTILINE,
            ).groups()
            written = [path for path in (tmp_path / form).rglob("*") if path.suffix in (".mp4", ".jpg")]
            ratio = sum(path.stat().st_size for path in written) / sum(p.stat().st_size for p in root.glob("*.mp4"))
            assert float(factor) == pytest.approx(ratio, rel=0.2)
            assert "..." not in out
            assert "data.num_classes=3" in out
            assert "space of these videos" not in rubiks_command(*choices, "--form", form, "--out", tmp_path / form)
        assert "space of these videos" not in rubiks_command(*choices, "--form", "h264", "--out", tmp_path / "h264")
        recipe = rubiks_command(*choices, "recipe=finetune", "--out", tmp_path / "other")
        assert "For training, add: recipe=finetune" in recipe

    def test_nothing_written_is_no_success(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "a.mp4").write_text("no video")
        (tmp_path / "val.csv").write_text("a.mp4,0\n")
        words = ["data=csv", f"data.root={tmp_path}", "data.val_list=val.csv", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["rubiks", "prepare", *words, "--workers", "1"])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 1
        out = capsys.readouterr().out
        assert "No videos were prepared" in out
        assert "a.mp4: cannot be opened as a video" in out
        assert "Use it with" not in out

    def test_folders_of_frames_may_have_dots_in_their_names(self):
        assert target_name("clips/v.1", "jpeg", folder=True) == "clips/v.1.mp4"
        assert target_name("clips/v.1", "frames", folder=True) == "clips/v.1"
        assert target_name("clips/v.1.webm", "frames") == "clips/v.1"

    def test_refusals(self, tmp_path, rubiks_command):
        root, out = tmp_path / "csv", tmp_path / "out"
        root.mkdir()
        for name in ("a.mp4", "a.mkv"):
            write_video(root / name, moving_square(5))
        (root / "val.csv").write_text("a.mp4,0\n")
        choices = ("data=csv", f"data.root={root}", "data.val_list=val.csv", "data.train_list=val.csv", "--out")
        assert "is the folder of the data set itself" in rubiks_command(*choices, root)
        assert "Use it with" in rubiks_command(*choices, out)
        assert "was started with" in rubiks_command(*choices, out, "--short-side", 128)
        (root / "val.csv").write_text("a.mp4,0\na.mkv,0\n")
        assert "both become a.mp4" in rubiks_command(*choices, tmp_path / "other")
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "list.csv").write_text("a.mp4,0\n")
        lists = [
            f"data.{split}_list={tmp_path / folder / 'list.csv'}"
            for split, folder in (("train", "one"), ("val", "two"))
        ]
        assert "both become list.csv; rename" in rubiks_command(*choices[:2], *lists, "--out", tmp_path / "other")
        assert not (tmp_path / "other" / "a.mp4").exists()
        (root / "val.csv").write_text("a.mp4,0\n./a.mp4,0\n")
        assert "Use it with" in rubiks_command(*choices, tmp_path / "spelled")
        (tmp_path / "file").touch()
        assert "is a file; choose a folder" in rubiks_command(*choices, tmp_path / "file")
        assert "cannot be written: Not a directory" in rubiks_command(*choices, tmp_path / "file" / "out")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        assert "contains other files" in rubiks_command(*choices, tmp_path / "full")


def tree(folder):
    """Content and time stamp of every file."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns if path.suffix in (".mp4", ".jpg") else 0)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_killed_at_any_moment(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    for number in range(30):
        write_video(root / f"{number}.mp4", moving_square(12, 96, 128 + 2 * number))

    def jobs(out):
        """Every video, with the forms in turn."""
        made = []
        for path, form in zip(sorted(root.iterdir()), cycle(("jpeg", "frames", "h264")), strict=False):
            name = target_name(path.name, form)
            made.append(Job(VideoRecord(str(path), 0), out / name, name, form, 64))
        return made

    assert prepare(jobs(tmp_path / "whole"), Manifest(tmp_path / "whole"), 2, 60) == {}
    expected = tree(tmp_path / "whole")
    assert len({path.parts[0] for path in expected}) == 31

    out = tmp_path / "killed"
    unfinished = 0
    for files in (1, 5, 9):
        process = multiprocessing.get_context("forkserver").Process(
            target=prepare, args=(jobs(out), Manifest(out), 2, 60)
        )
        process.start()
        while process.is_alive() and sum(1 for path in out.glob("[!.]*")) < files + 1:
            time.sleep(0.001)
        process.kill()
        process.join()
        unfinished += tree(out) != expected
    assert unfinished
    assert prepare(jobs(out), Manifest(out), 2, 60) == {}
    while list(out.rglob(".*.tmp")):  # of a worker whose parent was killed, which ends with its video
        time.sleep(0.01)
    found = tree(out)
    assert {path for path in {*found, *expected} if found.get(path) != expected.get(path)} == set()


def test_rates_of_frame_folders_do_not_matter(tmp_path):
    for number, image in enumerate(moving_square(6), start=1):
        av.VideoFrame.from_ndarray(image, format="rgb24").to_image().save(tmp_path / f"{number}.png")
    job = Job(VideoRecord(str(tmp_path), 0, 6, "{}.png"), tmp_path / "out" / "a.mp4", "a.mp4", "jpeg", 256)
    assert prepare([job], Manifest(tmp_path / "out"), 1, 60) == {}
    with av.open(str(job.target)) as container:
        assert container.streams.video[0].average_rate == Fraction(30)
    assert psnr(moving_square(6), decode_in_order(job.target)) > 26
