"""`rubiks shard` and `rubiks bench-data`, and what they share with benchmarks/data.py."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from conftest import ROOT
from test_benchmarks import benchmark
from videos import moving_square, write_video

from rubiks.cli.shard import size_in_bytes
from rubiks.data import speed
from rubiks.data.records import VideoRecord
from rubiks.data.views import TrainingViews
from rubiks.errors import InputError

REPORT = ROOT / "benchmarks" / "results" / "network_h200.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of data=csv with six videos."""
    folder = tmp_path_factory.mktemp("csv")
    for number in range(6):
        write_video(folder / f"{number}.mp4", moving_square(10, height=48, width=64))
    (folder / "train.csv").write_text("".join(f"{number}.mp4,{'ab'[number % 2]}\n" for number in range(4)))
    (folder / "val.csv").write_text("4.mp4,a\n5.mp4,b\n")
    return folder


def test_a_data_set_goes_to_shards_and_is_measured_from_them(rubiks_command, folder, tmp_path):
    choices = ("data=csv", f"data.root={folder}", "data.train_list=train.csv", "data.val_list=val.csv")
    status, out, _ = rubiks_command("shard", *choices, "data.flip=true", "--out", tmp_path / "shards", "--size", "1KB")
    assert status == 0
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) > 1
    assert "data=shards" in out
    assert "data.name=csv" in out
    assert "data.flip=true" in out
    shards = ("data=shards", f"data.root={tmp_path / 'shards'}", "data.size=32", "tier=large")
    status, out, _ = rubiks_command("bench-data", *shards, "--videos", 3, "--readers", "pyav", "--json")
    facts = json.loads(out)
    (row,) = facts["rows"]
    assert status == 0
    assert (row["videos"], row["unreadable"], row["reader"]) == (3, 0, "pyav")
    assert facts["clips_per_second"] == speed.measured_clips_per_second(REPORT, "large", "rubiks3d")
    assert row["cores"]["training"] == pytest.approx(
        facts["clips_per_second"]["training"] / row["videos_per_core_second"]
    )
    assert all(row["wall_ms"][stage] > 0 for stage in ("open", "decode", "views", "collate"))
    status, out, _ = rubiks_command(
        "bench-data", *shards, "data.clips_per_video=2", "--clips-per-second", 100, "--json"
    )
    (row,) = json.loads(out)["rows"]
    assert row["cores"]["the GPU"] == pytest.approx(50 / row["videos_per_core_second"])
    status, out, _ = rubiks_command("bench-data", *shards, "--clips-per-second", 100)
    assert "(--clips-per-second): the GPU 100" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench-data", "data=csv"), "data.train_list is not set"),
        (("bench-data", "data=nothing"), "nothing"),
        (("bench-data", "--readers", "opencv"), "data.reader must be one of"),
        (
            ("bench-data", "data.train_videos=20", "data.val_videos=20", "--clips-per-second", "-1"),
            "--clips-per-second",
        ),
        (("shard", "--out", "x", "--size", "many"), "expected a size such as 500MB"),
        (("check", "data=shards", "data.root=x"), "check the original videos"),
        (("prepare", "data=shards", "data.root=x", "--out", "y"), "prepare the original videos"),
    ],
)
def test_wrong_choices_are_one_message(rubiks_command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = rubiks_command(*words)
    assert status == 2
    assert message in err


def test_sizes():
    sizes = {"1GB": 10**9, "500 mb": 5 * 10**8, "1.5K": 1500, "7": 7}
    assert {text: size_in_bytes(text) for text in sizes} == sizes
    with pytest.raises(InputError):
        size_in_bytes("0")


def test_unreadable_videos_are_counted_and_none_readable_is_an_error(folder, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    views = TrainingViews(4, 32, (1.0,))
    bad = VideoRecord(str(tmp_path / "bad.mp4"), 0)
    row = speed.measure([bad, VideoRecord(str(folder / "0.mp4"), 0)], views, "auto", 2)
    assert (row["videos"], row["unreadable"]) == (1, 1)
    with pytest.raises(InputError, match=r"none of the 1 videos can be read.*bad\.mp4"):
        speed.measure([bad], views, "auto", 2)


def test_the_benchmark_compares_the_originals_with_their_prepared_forms(folder, capsys, tmp_path):
    bench = benchmark("data")
    (tmp_path / "raw").mkdir()
    for number in (1, 2):
        shutil.copy(folder / f"{number}.mp4", tmp_path / "raw")
    words = [f"raw={tmp_path / 'raw'}", "--readers", "auto", "pyav", "--rounds", "1", "--repeat", "1", "--size", "32"]
    with pytest.raises(InputError, match="found no files"):
        bench.run(bench.parse(["raw=nowhere"]), tmp_path / "work")
    with pytest.raises(InputError, match=r"csv: .*; remove it from the folder"):
        bench.run(bench.parse([f"raw={folder}"]), tmp_path / "work")
    report = bench.run(bench.parse(words), tmp_path / "new")
    rows = [(row["form"], row["reader"], row["videos"]) for row in report["rows"]]
    assert rows == [("raw", "auto", 2), ("raw", "pyav", 2), ("raw jpeg", "auto", 2), ("raw h264", "auto", 2)]
    rates = [row["videos_per_core_second"] for row in report["rows"]]
    assert report["ratios"]["raw jpeg / raw"] == pytest.approx(rates[2] / rates[0])
    assert len(capsys.readouterr().out.splitlines()) == 4 + len(report["ratios"])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_the_benchmark_sees_the_memory_of_workers(folder):
    bench = benchmark("data")
    views = TrainingViews(2, 32, (1.0,))
    records = [VideoRecord(str(folder / f"{number}.mp4"), 0) for number in range(3)]
    gained = bench.memory(records, views, 2, (100, 300))
    assert len(gained) == 3
    assert max(gained) < 50


def test_the_report_of_the_networks_has_every_tier():
    for tier in ("tiny", "small", "medium", "large"):
        assert set(speed.measured_clips_per_second(REPORT, tier, "rubiks3d")) == {"training", "inference"}
    aq, plain = (speed.measured_clips_per_second(REPORT, "tiny", name) for name in ("rubiks3d-aq", "rubiks3d"))
    assert aq["inference"] != plain["inference"]
    assert speed.measured_clips_per_second(REPORT, "tiny", "grouped") == {}


def test_the_readme_tells_the_numbers_of_the_report():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for tier in ("tiny", "small", "medium", "large"):
        rates = speed.measured_clips_per_second(REPORT, tier, "rubiks3d")
        assert f"| {tier} | {rates['inference']:,.0f} (" in readme
        assert f" | {rates['training']:,.0f} (" in readme
