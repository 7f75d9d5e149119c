"""`rubiks prepare`: rewrites a data set in a form that is quick to read."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rubiks.cli.check import BAD_FILES, add_arguments, processes, progress, write_bad
from rubiks.errors import InputError, VideoError

if TYPE_CHECKING:
    from rubiks.data.manifest import Manifest
    from rubiks.data.prepare import Job
    from rubiks.data.records import VideoRecord
    from rubiks.data.sources import HMDB51, ListedSource, Split

_SETTINGS = "rubiks-prepare.json"
_TIMED_VIDEOS = 9


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser."""
    about = "write a copy of a data set with small frames, which is quick to read at random"
    parser = commands.add_parser("prepare", help=about, description=about[0].upper() + about[1:] + ".")
    add_arguments(parser, 600)
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="the new data set; an interrupted run resumes in it"
    )
    parser.add_argument(
        "--form",
        choices=("jpeg", "h264", "frames"),
        default="jpeg",
        help="jpeg (default): mp4 files of JPEG frames, the fastest; h264: a quarter of the size; frames: JPEG folders",
    )
    parser.add_argument(
        "--short-side",
        type=int,
        default=256,
        metavar="PIXELS",
        help="short side of the frames; never enlarged; default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prepare, write lists and manifest, and report space and speed."""
    from rubiks.choices import setting
    from rubiks.cli.entry import recipe_name, training  # imports Lightning, which takes seconds
    from rubiks.data.manifest import Manifest
    from rubiks.data.prepare import Job, prepare, target_name
    from rubiks.data.sources import HMDB51, CsvLists, FrameLists, ListedSource, read_lists

    workers, out, form = processes(arguments), Path(arguments.out), arguments.form
    if arguments.short_side < 16:
        raise InputError(f"--short-side must be at least 16 pixels, got {arguments.short_side}")
    data = training(arguments.data).data
    if data.source.format == "images":
        raise InputError("data=images holds still images, which need no preparation")
    if data.source.format == "shards":
        raise InputError("data=shards cannot be prepared; prepare the original videos, and write shards of the result")
    source = data.source.ready()
    classes = source.classes
    assert isinstance(source, (ListedSource, HMDB51))
    kept_layout = form != "frames" and not isinstance(source, (CsvLists, FrameLists))
    lists, missing, absent = read_lists(source)
    problems = [f"{split}: {len(m):,} videos are missing; the first is {m[0]}" for split, m in missing.items() if m]
    problems += [f"{split} list not prepared: {reason}" for split, reason in absent.items()]
    root, is_builtin = Path(source.root), source is not data.source
    if out.resolve() == root.resolve():
        raise InputError(f"--out={out} is the folder of the data set itself; choose another")
    names = Manifest(root)
    copies = kept_layout or (form != "frames" and isinstance(source, CsvLists))
    places = _places(source.annotation_files().values() if copies else (), names)
    _keep_settings(out, {"form": form, "short_side": arguments.short_side})

    jobs: dict[str, Job] = {}
    for record in (record for records in lists.values() for record in records):
        own = names.name_of(record.path)
        if kept_layout and os.path.isabs(own):
            raise InputError(
                f"{record.path} is outside data.root={root}, so it has no path in the new data set; set data.root to a "
                "folder that contains all videos"
            )
        name = target_name(own, form, record.pattern is not None)
        known = jobs.setdefault(name, Job(record, out / name, name, form, arguments.short_side))
        if os.path.normpath(known.record.path) != os.path.normpath(record.path):
            raise InputError(f"{known.record.path} and {record.path} would both become {name}; rename one of them")
    manifest = Manifest(out)
    if manifest.outdated:
        print(
            f"{manifest.path}: {manifest.outdated:,} entries are from another version; their videos are written again"
        )
    if not manifest.entries.keys() >= jobs.keys():
        _tell_space([job.record for job in jobs.values()], form, arguments.short_side, out)
    with progress("Preparing", len(jobs)) as advance:
        bad = prepare(list(jobs.values()), manifest, workers, arguments.timeout, advance)
    here = setting("data.root", out)
    if kept_layout:
        for path, place in places.items():
            _copy(path, out / place)
        same = [choice for choice in arguments.data if not choice.startswith("data.root=")]
        usage = ["data=ssv2", "data.num_classes=null"] if is_builtin else same
        usage.append(here)
    else:
        usage = [*_write_lists(source, classes, lists, names, places, out, form, manifest), here]
        usage += [setting("data.name", source.name), setting("data.flip", data.sampling.flip)]
        if classes is None:
            highest = max(record.label for records in lists.values() for record in records)
            usage.append(f"data.num_classes={source.num_classes or highest + 1}")
    print(*problems, sep="\n", end="\n" if problems else "")
    write_bad(out / BAD_FILES, bad)
    done = [job for job in jobs.values() if job.name in manifest.entries]
    if not done:
        print("No videos were prepared")
        sys.exit(1)
    _report(done, manifest)
    print("Use it with:", shlex.join(usage))
    recipe = recipe_name(arguments.data)
    if (usage[0] != f"data={recipe}" and not kept_layout) or is_builtin:
        print(f"For training, add: recipe={recipe}")


def _tell_space(records: Sequence[VideoRecord], form: str, short_side: int, out: Path) -> None:
    """Say beforehand how much more space the copies take, if each frame is stored separately."""
    from rubiks.data.estimate import estimate
    from rubiks.data.manifest import stamp

    expected = estimate(records, form, short_side) if form in ("jpeg", "frames") else None
    if expected is None or expected.after <= expected.before:
        return
    factor = expected.after / expected.before
    before = sum(stamp(record)[0] for record in records)
    print(
        f"JPEG frames take about {factor:.1f} times the space of these videos (measured on {expected.videos}), "
        f"{factor * before / 1e9:.3f} GB instead of {before / 1e9:.3f} GB; the disk of {out} has "
        f"{shutil.disk_usage(out).free / 1e9:.3f} GB free. --form h264 takes less",
        flush=True,
    )


def _keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue in a folder that was begun with other settings."""
    from rubiks.files import write_atomically

    path = out / _SETTINGS
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}; choose another --out") from None
        if before != settings:
            raise InputError(f"{out} was started with {before}, not {settings}; choose another --out")
    elif out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file; choose a folder")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"--out={out} contains other files; choose a new folder, or one that rubiks prepare started")
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8"))


def _write_lists(
    source: ListedSource | HMDB51,
    classes: list[str] | None,
    lists: dict[Split, list[VideoRecord]],
    names: Manifest,
    places: dict[str, str],
    out: Path,
    form: str,
    manifest: Manifest,
) -> list[str]:
    """Write labels and lists, and return the choices that read them."""
    from rubiks.choices import setting
    from rubiks.data.prepare import target_name, write_csv
    from rubiks.data.sources import CsvLists
    from rubiks.data.writers import PATTERN
    from rubiks.files import write_lines

    def target(record: VideoRecord) -> str:
        return target_name(names.name_of(record.path), form, record.pattern is not None)

    files = source.annotation_files()
    choices = [f"data={'frames' if form == 'frames' else 'csv'}"]
    for split, records in lists.items():
        if form == "frames":
            known = [(target(record), record.label) for record in records if target(record) in manifest.entries]
            lines = [f"{name} {manifest.entries[name].frames} {label}" for name, label in known]
            write_lines(out / f"{split}.txt", lines)
            choices.append(f"data.{split}_list={split}.txt")
            continue
        if isinstance(source, CsvLists):
            paths = [(names.name_of(os.path.join(names.root, path)), label) for path, label in source.rows(split)]
            rows = [(target_name(path, form), label) for path, label in paths]
            relative = places[files[f"data.{split}_list"]]
        else:
            rows, relative = [(target(record), str(record.label)) for record in records], f"{split}.csv"
        write_csv(out / relative, rows)
        choices.append(setting(f"data.{split}_list", relative))
    if isinstance(source, CsvLists) and form != "frames":
        if labels := files.get("data.labels"):
            _copy(labels, out / places[labels])
            choices.append(setting("data.labels", places[labels]))
    elif classes is not None:
        write_lines(out / "labels.txt", classes)
        choices.append("data.labels=labels.txt")
    if form == "frames":
        choices.append(setting("data.pattern", PATTERN))
    return choices


def _places(paths: Iterable[str], names: Manifest) -> dict[str, str]:
    """Where lists go: to the same relative path as in the source, or else to the top of the folder."""
    places: dict[str, str] = {}
    for path in paths:
        name = names.name_of(path)
        place = os.path.basename(name) if os.path.isabs(name) else name
        for other, taken in places.items():
            if taken == place and not os.path.samefile(other, path):
                raise InputError(f"{other} and {path} would both become {place}; rename one of them")
        places[path] = place
    return places


def _copy(path: str, target: Path) -> None:
    from rubiks.files import write_atomically

    write_atomically(target, lambda temporary: shutil.copyfile(path, temporary))


def _report(jobs: Sequence[Job], manifest: Manifest) -> None:
    """Print the space, and the time to read 8 frames of some videos, before and after."""
    from rubiks.data.manifest import stamp

    before = sum(stamp(job.record)[0] for job in jobs)
    after = sum(manifest.entries[job.name].size for job in jobs)
    some = list(jobs)[:: -(-len(jobs) // _TIMED_VIDEOS)]
    written = manifest.apply([job.written(manifest.entries[job.name].frames) for job in some])
    try:
        times = [sum(map(_seconds, videos)) for videos in ([job.record for job in some], written)]
    except VideoError as error:
        print(f"Speed not measured: {error}")
        return
    print(
        f"{len(jobs):,} videos, {before / 1e9:.3f} GB before, {after / 1e9:.3f} GB after; 8 frames of a video take "
        f"{1e3 * times[0] / len(some):.1f} ms before, {1e3 * times[1] / len(some):.1f} ms after "
        f"(mean of {len(some)} videos): {times[0] / times[1]:.1f} times as fast"
    )


def _seconds(record: VideoRecord) -> float:
    """The shortest of three times to open a video and read 8 of its frames."""
    from rubiks.data.decode import open_video

    def once() -> float:
        start = time.perf_counter()
        with open_video(record) as video:
            length = len(video)
            video.frames([(2 * i + 1) * length // 16 for i in range(8)])
        return time.perf_counter() - start

    return min(once() for _ in range(3))
