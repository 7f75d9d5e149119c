"""`rubiks check`, the manifest, and damaged files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from commands import Commands
from conftest import ROOT
from generated import FILES
from tasks import sleep_or_die
from videos import cut_without_encoding, decode_in_order, moving_square, real_clip, write_video

from rubiks.data import builtin, decode, videos
from rubiks.data.check import check, official_total
from rubiks.data.datamodule import Loading
from rubiks.data.examine import examine
from rubiks.data.manifest import Manifest
from rubiks.data.prepare import Job, prepare
from rubiks.data.records import VideoRecord
from rubiks.data.workers import LostWorkerError, work
from rubiks.errors import InputError, VideoError
from rubiks.models import checkpoint


@pytest.fixture(scope="module", autouse=True)
def _this_package():
    """Worker processes import the tested package, whatever a test's working directory is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", moving_square(40), b_frames=2)
    write_video(folder / "b.webm", moving_square(30), codec="libvpx-vp9")
    write_video(folder / "c.avi", moving_square(24), codec="mpeg4")
    write_video(folder / "d.mkv", moving_square(20))
    return folder


def reason(path):
    with pytest.raises(VideoError) as caught:
        examine(VideoRecord(str(path), 0), "x")
    assert "\n" not in caught.value.reason
    return caught.value.reason


class TestExamine:
    @pytest.mark.parametrize(("name", "frames"), [("a.mp4", 40), ("b.webm", 30), ("c.avi", 24), ("d.mkv", 20)])
    def test_a_good_video(self, clips, name, frames):
        seen = []
        entry = examine(VideoRecord(str(clips / name), 0), name, lambda frame, rate: seen.append(rate))
        assert (entry.frames, entry.width, entry.height, entry.rate) == (frames, 80, 64, 12)
        assert (entry.size, entry.problem, entry.doubt) == ((clips / name).stat().st_size, None, None)
        assert len(seen) == frames

    @pytest.mark.parametrize("name", ["kinetics_demo.mp4", "mpeg4_test.avi", "short_32frames.mp4", "ssv2_like.webm"])
    def test_real_clips_are_good(self, name):
        entry = examine(VideoRecord(real_clip(name), 0), name)
        assert entry.doubt is None
        assert entry.frames > 30

    def test_hidden_frames_do_not_count_and_are_no_fault(self, clips, tmp_path):
        cut_without_encoding(str(clips / "a.mp4"), tmp_path / "cut.mp4", 17)
        entry = examine(VideoRecord(str(tmp_path / "cut.mp4"), 0), "cut")
        assert (entry.frames, entry.seek) == (23, "pyav")  # libraries would count the others

    def test_damaged_frames_that_decode_without_an_error(self, clips, tmp_path):
        whole = (clips / "a.mp4").read_bytes()
        path = tmp_path / "a.mp4"
        named = 0
        for position in np.random.default_rng(0).integers(len(whole) // 5, len(whole) * 4 // 5, 12):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
            try:
                frames = decode_in_order(path)
            except av.FFmpegError:
                continue
            if len(frames) == 40:  # players show it, and some damage looks like content
                try:
                    examine(VideoRecord(str(path), 0), "x")
                except VideoError as error:
                    named += "of its 40 frames are damaged" in str(error)
        assert named >= 3

    def test_a_gap_in_time(self, tmp_path):
        path = tmp_path / "gap.webm"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libvpx-vp9", rate=10, options={"deadline": "realtime", "cpu-used": "8"})
            stream.height, stream.width, stream.pix_fmt = 64, 80, "yuv420p"
            for index, image in enumerate(moving_square(40)):
                if not 10 <= index < 30:
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts = index
                    container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert "has 20 frames, but its duration and rate imply 40" in reason(path)

    def test_frame_folders(self, tmp_path):
        for number, image in enumerate(moving_square(3), start=1):
            av.VideoFrame.from_ndarray(image, format="rgb24").to_image().save(tmp_path / f"{number}.png")
        record = VideoRecord(str(tmp_path), 0, 3, "{}.png")
        entry = examine(record, "x")
        assert (entry.frames, entry.width, entry.height) == (3, 80, 64)
        with pytest.raises(VideoError, match=r"4.png is missing"):
            examine(dataclasses.replace(record, num_frames=4), "x")


def mutations(whole: bytes, other: bytes, rng: np.random.Generator, number: int) -> tuple[str, bytes]:
    """One damaged copy of a file, and how it was damaged."""
    kind = ("cut", "flipped", "zeros", "header", "swapped")[number % 5]
    start, end = sorted(rng.integers(0, len(whole), 2).tolist())
    if kind == "cut":
        return kind, whole[:start]
    if kind == "flipped":
        bad = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 60)):
            bad[position] ^= 1 << rng.integers(8)
        return kind, bytes(bad)
    if kind == "zeros":
        return kind, whole[:start] + bytes(end - start) + whole[end:]
    if kind == "header":
        size = int(rng.integers(1, 400))
        return kind, other[:size] + whole[size:]
    return kind, whole[:start] + whole[end:] + whole[start:end]


def test_a_thousand_damaged_files(tmp_path):
    """None crashes or hangs the checking process; each is decoded or reported; no file that was cut short passes."""
    names = {"a.mp4": "libx264", "b.webm": "libvpx-vp9", "c.avi": "mpeg4", "d.mkv": "libx264"}
    for name, codec in names.items():
        write_video(tmp_path / name, moving_square(10, 48, 64), codec)
    names["jpegs.mp4"] = "as rubiks prepare writes it"
    job = Job(VideoRecord(str(tmp_path / "a.mp4"), 0), tmp_path / "jpegs.mp4", "jpegs.mp4", "jpeg", 48)
    assert prepare([job], Manifest(tmp_path, "prepared.jsonl"), 1, 20) == {}
    wholes = {name: (tmp_path / name).read_bytes() for name in names}
    rng = np.random.default_rng(0)
    records, kinds = [], {}
    for number in range(1000):
        name = list(names)[number // 5 % 5]
        kind, content = mutations(wholes[name], wholes[list(names)[rng.integers(5)]], rng, number)
        path = tmp_path / f"{kind}{number}-{name}"
        path.write_bytes(content)
        kinds[path.name] = kind
        records.append(VideoRecord(str(path), 0))
    manifest = Manifest(tmp_path)
    check(records, manifest, 2, 20)
    assert set(manifest.entries) == set(kinds)
    problems = [entry.problem for entry in manifest.entries.values()]
    assert not [problem for problem in problems if problem and ("ended the process" in problem or "limit" in problem)]
    missed = [name for name, kind in kinds.items() if kind == "cut" and manifest.entries[name].problem is None]
    assert missed == []
    good = [entry for entry in manifest.entries.values() if entry.problem is None]
    assert 0 < len(good) < 500
    for entry in good[::10]:  # and what passes can be read
        with decode.open_video(VideoRecord(str(tmp_path / entry.name), 0)) as video:
            assert len(video.frames([0, entry.frames - 1])) == 2


class TestWorkers:
    def test_hangs_crashes_and_bad_videos_are_named_and_the_rest_goes_on(self):
        items = [0, 60, 0.01, -1, -2, 0, 0.02]
        results = list(work(sleep_or_die, items, "video{}".format, 2, 0.5))
        assert sorted(item for item, _ in results) == sorted(items)
        found = dict(results)
        assert isinstance(found[60], LostWorkerError)
        assert str(found[60]) == "video60: took longer than the limit of 0.5 seconds and was stopped"
        assert "status -11" in str(found[-1])
        assert str(found[-2]) == "v: bad"
        assert (found[0], found[0.02]) == (0, 0.02)

    def test_defects_are_raised(self):
        with pytest.raises(ZeroDivisionError):
            list(work(sleep_or_die, [0, -3, 0], str, 1, 5))


class TestManifest:
    @pytest.fixture
    def checked(self, clips, tmp_path):
        shutil.copytree(clips, tmp_path, dirs_exist_ok=True)
        records = [VideoRecord(str(tmp_path / name), 0) for name in ("a.mp4", "b.webm", "c.avi")]
        (tmp_path / "c.avi").write_bytes((tmp_path / "c.avi").read_bytes()[:-5000])
        check(records, Manifest(tmp_path), 1, 60)
        return tmp_path, records

    def test_counts_are_used_where_the_size_is_the_same(self, checked, monkeypatch):
        folder, records = checked
        known = Manifest(folder).apply(records)
        assert [record.checked and record.checked.frames for record in known] == [40, 30, None]
        with monkeypatch.context() as patch:
            patch.setattr(decode.VideoFile, "_look", lambda self: pytest.fail("counted again"))
            with decode.open_video(known[0]) as video:
                frames = video.frames([0, 39, 17])
                assert len(video) == 40
        with decode.open_video(records[0]) as video:
            np.testing.assert_array_equal(frames, video.frames([0, 39, 17]))
        write_video(folder / "a.mp4", moving_square(9))
        with decode.open_video(known[0]) as video:
            assert len(video) == 9

    def test_only_changed_files_are_read_again(self, checked, monkeypatch):
        folder, records = checked
        before = Manifest(folder)
        write_video(folder / "b.webm", moving_square(7), codec="libvpx-vp9")
        read = []
        import rubiks.data.check

        def spy(function, items, *others):
            read.extend(name for _, name in items)
            return work(function, items, *others)

        monkeypatch.setattr(rubiks.data.check, "work", spy)
        manifest = Manifest(folder)
        check(records, manifest, 1, 60)
        assert read == ["b.webm"]
        assert manifest.entries["b.webm"].frames == 7
        assert manifest.digest != before.digest

    def test_what_was_half_written_is_done_again(self, checked):
        folder, records = checked
        whole = (folder / "rubiks-manifest.jsonl").read_bytes()
        for cut in (0, 10, len(whole) // 2, len(whole) - 1):
            (folder / "rubiks-manifest.jsonl").write_bytes(whole[:cut])
            check(records, Manifest(folder), 1, 60)
            assert (folder / "rubiks-manifest.jsonl").read_bytes() == whole

    def test_entries_of_another_version_are_not_used_but_checked_anew(self, checked, rubiks_command, caplog):
        folder, records = checked
        path = folder / "rubiks-manifest.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        old = [{key: value for key, value in line.items() if key != "version"} | {"can_seek": True} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in [*old[:1], lines[1] | {"version": 99}, lines[2]]))
        manifest = Manifest(folder)
        assert (manifest.outdated, set(manifest.entries)) == (2, {"c.avi"})
        assert manifest.apply(records)[0].checked is None

        (folder / "list.csv").write_text("a.mp4,0\nb.webm,0\nc.avi,0\n")
        words = ("data=csv", f"data.root={folder}", "data.val_list=list.csv", "data.num_classes=1", "--workers", "1")
        assert rubiks_command("check", *words)[0] == 1  # c.avi
        told = "2 entries are from another version and are ignored until rubiks check has read their videos again"
        assert caplog.messages == [f"{path}: {told}"]
        assert [json.loads(line) for line in path.read_text().splitlines()] == lines
        rubiks_command("check", *words)
        assert len(caplog.messages) == 1

    @pytest.mark.parametrize("content", ['{"a": 1}\n', '{"Run": "0", "Jump": "1"}', "[]", "video.mp4,0"])
    def test_another_file(self, tmp_path, content):
        (tmp_path / "labels.json").write_text(content)
        with pytest.raises(InputError, match=r"labels.json, line 1: expected an entry.*data.manifest to another name"):
            Manifest(tmp_path, "labels.json")
        with pytest.raises(InputError, match=r"Is a directory.*; set data.manifest to another name"):
            Manifest(tmp_path, ".")

    def test_entries_of_other_lists_are_kept_where_these_cannot_be_read(self, checked):
        folder, records = checked
        check(records[:1], Manifest(folder), 1, 60, whole=False)
        assert set(Manifest(folder).entries) == {"a.mp4", "b.webm", "c.avi"}
        check(records[:1], Manifest(folder), 1, 60)
        assert set(Manifest(folder).entries) == {"a.mp4"}

    def test_a_manifest_of_other_videos_is_told(self, checked, caplog):
        folder, records = checked
        loading = Loading(max_bad=0, on_error="raise")
        for known, told in ((records, False), ([VideoRecord(str(folder / "d.mkv"), 0)], True)):
            caplog.clear()
            source = SimpleNamespace(val_list="val.csv", records=lambda split, known=known: (known, []))
            videos.records(source, loading, "val", 1, Manifest(folder))
            assert ("has no entries for the val videos" in caplog.text) == told

    def test_names_that_are_not_text(self, clips, tmp_path):
        names = [os.fsdecode(b"\xff.mp4"), "\ud800.mp4", "ä.mp4"]
        os.symlink(clips / "a.mp4", tmp_path / names[0])
        os.symlink(clips / "a.mp4", tmp_path / names[2])
        check([VideoRecord(str(tmp_path / name), 0) for name in (names[0], names[2])], Manifest(tmp_path), 1, 60)
        manifest = Manifest(tmp_path)
        manifest.append(dataclasses.replace(manifest.entries[names[2]], name=names[1]))
        again = Manifest(tmp_path)
        assert set(again.entries) == set(names)
        assert again.digest == manifest.digest

    def test_a_folder_that_a_list_gives_any_number_of_frames(self, tmp_path):
        record = VideoRecord(str(tmp_path), 0, 10**12, "{}.jpg")
        check([record], Manifest(tmp_path), 1, 60)
        (entry,) = Manifest(tmp_path).entries.values()
        assert "1.jpg" in entry.problem


@pytest.fixture
def rubiks_command(rubiks_command, monkeypatch, tmp_path):
    """The command in a separate folder."""
    monkeypatch.chdir(tmp_path)
    return rubiks_command


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches.*")
class TestCommand:
    def test_something_something(self, clips, tmp_path, rubiks_command):
        videos = tmp_path / "20bn-something-something-v2"
        videos.mkdir()
        for name in "123":
            shutil.copy(clips / "b.webm", videos / f"{name}.webm")
        write_video(videos / "3.webm", moving_square(12), codec="libvpx-vp9")
        (videos / "4.webm").write_bytes((clips / "b.webm").read_bytes()[:3000])
        (tmp_path / "labels.json").write_text(json.dumps({"Run": "0", "Jump": "1", "Fly": "2"}))
        entries = [{"id": name, "template": "Run" if name in "135" else "Jump"} for name in "12345"]
        (tmp_path / "train.json").write_text(json.dumps(entries[1:]))
        (tmp_path / "validation.json").write_text(json.dumps(entries[:1]))
        status, out, _ = rubiks_command(
            "check", "data=ssv2", f"data.root={tmp_path}", "data.num_classes=3", "--workers", "1"
        )
        assert status == 1
        assert "in both training and validation: 2 videos in 1 groups" in out
        assert "train: 1 of the 3 classes have no videos; the first is 2" in out
        bad = dict(line.split("\t") for line in (tmp_path / "rubiks-bad.txt").read_text().splitlines())
        assert {os.path.basename(path): words for path, words in bad.items()} == {
            "4.webm": bad[str(videos / "4.webm")],
            "5.webm": "no such file",
        }
        assert "cut short" in bad[str(videos / "4.webm")]
        assert Manifest(tmp_path).digest in out

        for name in "45":
            shutil.copy(clips / "b.webm", videos / f"{name}.webm")
        status, out, _ = rubiks_command(
            "check", "data=ssv2", f"data.root={tmp_path}", "data.num_classes=3", "--workers", "1"
        )
        assert status == 0
        assert not (tmp_path / "rubiks-bad.txt").exists()

    def test_what_is_to_be_known_of_files(self, clips, tmp_path, rubiks_command):
        """Videos without key frames to seek to, with what that costs, and frames that players show in another shape."""
        write_video(tmp_path / "1.mp4", moving_square(40, 120, 160), gop=1000)
        write_video(tmp_path / "2.ts", moving_square(60, 120, 160), codec="mpeg2video")
        FILES["h264 two sizes.mkv"](tmp_path / "3.mkv")
        with av.open(str(tmp_path / "4.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.height, stream.width, stream.pix_fmt = 64, 80, "yuv420p"
            stream.codec_context.gop_size, stream.codec_context.sample_aspect_ratio = 4, Fraction(64, 51)
            container.mux([*stream.encode(av.VideoFrame(80, 64, "yuv420p")), *stream.encode()])
        (tmp_path / "val.csv").write_text("1.mp4,0\n2.ts,0\n3.mkv,0\n4.mp4,0\n")
        words = ("data=csv", f"data.root={tmp_path}", "data.val_list=val.csv", "data.num_classes=1", "--workers", "1")
        status, out, _ = rubiks_command("check", *words)
        assert status == 0
        assert "2 of 4 videos are decoded from their start for every clip (1 with a single key frame, 1 in" in out
        rates = re.search(r"exact\): (\d+) videos/s per core, (\d+) after `rubiks prepare` \(measured on 2\)", out)
        assert int(rates[1]) < int(rates[2])
        assert "val: 2 videos have non-square pixels or frames of different sizes; the first is 3.mkv: fr" in out
        remarks = {name: entry.remark for name, entry in Manifest(tmp_path).entries.items()}
        assert remarks["4.mp4"] == "its pixels are 64:51, not square, and are not rescaled"
        assert remarks["1.mp4"] is None
        shutil.copy(tmp_path / "val.csv", tmp_path / "train.csv")
        measured = rubiks_command("bench-data", *words[:-2], "data.train_list=train.csv", "data.size=32")[1]
        assert "2 of 4 videos are decoded from their start for every clip" in measured
        (tmp_path / "val.csv").write_text("3.mkv,0\n")
        assert "decoded from their start" not in rubiks_command("check", *words)[1]

    def test_labels_from_1(self, clips, tmp_path, rubiks_command):
        for name in ("a.mp4", "b.webm"):
            shutil.copy(clips / name, tmp_path)
        (tmp_path / "val.csv").write_text("a.mp4,1\nb.webm,2\n")
        words = ("data=csv", f"data.root={tmp_path}", "data.val_list=val.csv", "data.num_classes=2", "--workers", "1")
        status, out, _ = rubiks_command("check", *words)
        assert status == 1
        assert "val: 1 of 2 labels are not in 0 to 1" in out
        assert "labels seem to start at 1, but they must start at 0" in out
        assert "val: 1 of the 2 classes have no videos; the first is 0" in out

    def test_a_wrong_list_costs_nothing_that_was_checked(self, clips, tmp_path, rubiks_command):
        for name in ("a.mp4", "b.webm"):
            shutil.copy(clips / name, tmp_path)
        (tmp_path / "train.csv").write_text("a.mp4,0\na.mp4,0\n")
        (tmp_path / "val.csv").write_text("b.webm,1\n./a.mp4,0\n")
        words = ("check", "data=csv", f"data.root={tmp_path}", "data.train_list=train.csv", "data.num_classes=2")
        status, out, _ = rubiks_command(*words, "data.val_list=val.csv", "--workers", "1")
        assert status == 0
        assert "in both training and validation: 3 videos in 1 groups" in out
        assert "more than once in a list: 3 videos in 1 groups" in out
        repeats = (tmp_path / "rubiks-repeats.txt").read_text().splitlines()
        assert [line.partition("\t")[0] for line in repeats] == ["train", "train", "val", ""]
        before = Manifest(tmp_path).path.read_bytes()
        status, _, err = rubiks_command(*words, "data.val_list=vall.csv")
        assert status == 2
        assert "No file for data.val_list" in err
        assert Manifest(tmp_path).path.read_bytes() == before

    def test_ctrl_c(self, rubiks_command, monkeypatch):
        def interrupt(arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr("rubiks.cli.check.run", interrupt)
        assert rubiks_command("check", "data=builtin")[0] == 130

    def test_bad_choices(self, rubiks_command):
        assert "data.root is not set" in rubiks_command("check", "data=ssv2")[2]
        status, _, err = rubiks_command("check", "data=ssv2", "data.rot=x")
        assert status == 2
        assert "data.rot is not a key" in err
        assert "--workers" in rubiks_command("check", "data=builtin", "--workers", "0")[2]
        for seconds in ("0", "nan", "1e300"):
            assert "--timeout" in rubiks_command("check", "data=builtin", "--timeout", seconds)[2]

    def test_checkpoints_and_results_name_the_manifest(self, tmp_path, rubiks_command, monkeypatch, capsys):
        root = builtin.generate(tmp_path, "plain", 16, 8, 0, progress=False)
        choices = ("data.train_videos=16", "data.val_videos=8", f"data.root={tmp_path}")
        assert rubiks_command("check", "data=builtin", *choices)[0] == 0
        manifest = Manifest(tmp_path)
        assert len(manifest.entries) == 24
        assert all(name.startswith(root.name) for name in manifest.entries)
        commands = Commands(monkeypatch, capsys, tmp_path)
        small = (*choices, "data.size=16", "data.num_frames=1", "run=r")
        commands.train(*small, "recipe.batch_size=16", "recipe.epochs=1")
        saved = checkpoint.read(tmp_path / "outputs/r/checkpoints/last.ckpt")
        assert saved.config["manifest_sha256"] == manifest.digest
        commands.evaluate(*small)
        results = json.loads((tmp_path / "outputs/r/results.json").read_text())
        assert results["manifest_sha256"] == manifest.digest

    def test_official_totals(self):
        assert official_total("ssv2", 174, "train") == 168_913
        assert official_total("kinetics", 400, "val") == 19_906
        assert official_total("kinetics", 600, "train") is None
        assert official_total("ssv2", 8, "train") is None
        assert official_total("csv", None, "train") is None
        assert sum(official_total("ssv1", 174, split) for split in ("train", "val", "test")) == 108_499
        assert sum(official_total("jester", 27, split) for split in ("train", "val", "test")) == 148_092
        for split in (1, 2, 3):
            assert sum(official_total(f"ucf101-split{split}", 101, name) for name in ("train", "val")) == 13_320
            assert sum(official_total(f"hmdb51-split{split}", 51, name) for name in ("train", "val")) == 51 * 100
