"""`rubiks check`: reads a whole data set and reports what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rubiks.data.workers import LONGEST, cores
from rubiks.errors import InputError

if TYPE_CHECKING:
    from rubiks.data.manifest import Entry, Manifest
    from rubiks.data.records import VideoRecord
    from rubiks.data.sources import Split

BAD_FILES = "rubiks-bad.txt"
REPEATS = "rubiks-repeats.txt"


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser."""
    about = "decode every video of a data set completely; write a manifest and a list of bad files"
    parser = commands.add_parser("check", help=about, description=about[0].upper() + about[1:] + ".")
    add_arguments(parser, 120)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser, seconds: int) -> None:
    """Add the arguments that `check` and `prepare` share."""
    parser.add_argument(
        "data", nargs="+", metavar="KEY=VALUE", help="as for train.py, e.g. data=ssv2 data.root=/data/ssv2"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes; default: one per CPU")
    parser.add_argument(
        "--timeout", type=float, default=seconds, metavar="SECONDS", help="time limit per video; default: %(default)s"
    )


def processes(arguments: argparse.Namespace) -> int:
    """How many videos are read at once."""
    workers = arguments.workers
    if workers is None:
        workers = cores()
    if workers < 1:
        raise InputError(f"--workers must be a whole number of at least 1, got {workers}")
    if not 0 < arguments.timeout <= LONGEST:
        expected = f"a number of seconds above 0 and at most {LONGEST:,}"
        raise InputError(f"--timeout must be {expected}, got {arguments.timeout:g}")
    return workers


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal, on standard error; yields the function to call after each video."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def run(arguments: argparse.Namespace) -> None:
    """Check, print a table, write the manifest and the list of bad files; exit status 1 if something is wrong."""
    from rubiks.cli.entry import training  # imports Lightning, which takes seconds
    from rubiks.data import videos
    from rubiks.data.check import check, official_total
    from rubiks.data.sources import describe_wrong_labels, read_lists

    workers = processes(arguments)
    data = training(arguments.data).data
    if data.source.format == "shards":
        raise InputError("data=shards cannot be checked; check the original videos that the shards were written from")
    source, manifest = data.source.ready(), videos.manifest_of(data.source)
    videos.check_class_count(source)
    count = source.num_classes if source.classes is None else len(source.classes)
    lists, missing, absent = read_lists(source)
    everything = [record for records in lists.values() for record in records]
    with progress("Checking", len({record.path for record in everything})) as advance:
        check(everything, manifest, workers, arguments.timeout, advance, whole=not absent)

    notes = [f"{split} list not checked: {reason}" for split, reason in absent.items()]
    bad: dict[str, str] = {}
    wrong_labels = False
    table = Table("list", "listed", "official", "missing", "bad", "doubtful", "frames", "size", "fps", "GB")
    for split, records in lists.items():
        entries = [manifest.entries[manifest.name_of(record.path)] for record in records]
        good = [entry for entry in entries if entry.problem is None]
        problems = {r.path: e.problem for r, e in zip(records, entries, strict=True) if e.problem is not None}
        bad |= problems | dict.fromkeys(missing[split], "no such file")
        listed, official = len(records) + len(missing[split]), official_total(source.name, count, split)
        table.add_row(
            split,
            f"{listed:,}",
            "unknown" if official is None else f"{official:,}",
            f"{len(missing[split]):,}",
            f"{len(problems):,}",
            f"{sum(entry.doubt is not None for entry in good):,}",
            _span([entry.frames for entry in good]),
            _span([min(entry.width, entry.height) for entry in good]),
            _span([round(entry.rate) for entry in good]),
            f"{sum(entry.size for entry in entries) / 1e9:.3f}",
        )
        if official is not None and listed < official:
            notes.append(f"{split}: {official - listed:,} of the {official:,} official videos are not in the list")
        if count is not None:
            labels = [record.label for record in records]
            if (wrong := describe_wrong_labels(records, count)) is not None:
                wrong_labels = True
                notes.append(f"{split}: {wrong}")
            if empty := set(range(count)) - set(labels):
                notes.append(
                    f"{split}: {len(empty):,} of the {count} classes have no videos; the first is {min(empty)}"
                )
        notes += _on_files(split, good)
    if (test := official_total(source.name, count, "test")) is not None:
        notes.append(f"test: {test:,} official videos not checked, since their list has no labels")
    notes += _on_seeking(everything, manifest, data.loading.reader)
    notes += _on_repeats(lists, manifest)

    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print("frames, size (short side) and fps: minimum / median / maximum", *notes, sep="\n")
    print(f"Manifest: {manifest.path}, SHA-256 {manifest.digest}")
    write_bad(manifest.path.with_name(BAD_FILES), bad)
    if bad or wrong_labels:
        sys.exit(1)


def _on_files(split: Split, good: Sequence[Entry]) -> list[str]:
    """Notes on the good videos of a list."""
    doubtful = [entry for entry in good if entry.doubt is not None]
    notes = [f"{split}: {entry.name} decodes, but the decoder reports: {entry.doubt}" for entry in doubtful[:5]]
    if remarkable := [entry for entry in good if entry.remark is not None]:
        first = remarkable[0]
        notes.append(
            f"{split}: {len(remarkable):,} videos have non-square pixels or frames of different sizes; the "
            f"first is {first.name}: {first.remark}"
        )
    return notes


def _on_seeking(records: Sequence[VideoRecord], manifest: Manifest, reader: str) -> list[str]:
    """How many videos are decoded from their start for every clip, and what that costs."""
    from rubiks.data.estimate import describe_decoding_from_start, estimate

    names = {manifest.name_of(record.path): record for record in records}
    videos = {name: entry for name, entry in manifest.entries.items() if name in names and entry.problem is None}
    others = {name for name, entry in videos.items() if entry.seek == "none" and entry.frames > 1}
    single = {name for name, entry in videos.items() if entry.key_frames == 1 < entry.frames} - others
    slow = [names[name] for name in videos if name in single | others]
    if not slow:
        return []
    cost = estimate(manifest.apply(slow), "jpeg", reader=reader, from_start=True)
    return [describe_decoding_from_start(len(single), len(others), len(videos), cost)]


def _on_repeats(lists: Mapping[Split, Sequence[VideoRecord]], manifest: Manifest) -> list[str]:
    """Notes on videos with the same content, which are also written to a file."""
    from rubiks.data.check import repeated

    notes = []
    groups = repeated(lists, manifest)
    overlap = [group for group in groups if len({split for split, _ in group}) > 1]
    within = [group for group in groups if len({split for split, _ in group}) < len(group)]
    for what, found in (("in both training and validation", overlap), ("more than once in a list", within)):
        if found:
            paths = ", ".join(path for _, path in found[0][:3])
            notes.append(
                f"{what}: {sum(map(len, found)):,} videos in {len(found):,} groups with the same content; the first "
                f"group is {paths}"
            )
    path = manifest.path.with_name(REPEATS)
    if groups:
        notes.append(f"All videos with the same content are listed in {path}")
    write_list(path, [line for group in groups for line in (*map("\t".join, group), "")])
    return notes


def write_bad(path: Path, bad: dict[str, str]) -> None:
    """Write the list of bad files, path and reason; if there are none, remove what an earlier run wrote."""
    write_list(path, [f"{name}\t{reason}" for name, reason in sorted(bad.items())])
    if bad:
        name, reason = min(bad.items())
        print(f"Bad files: {len(bad):,}, listed in {path}; the first is {name}: {reason}")


def write_list(path: Path, lines: list[str]) -> None:
    """Write a list for the user; if it is empty, remove what an earlier run wrote."""
    from rubiks.files import write_lines

    if lines:
        write_lines(path, lines)
    else:
        path.unlink(missing_ok=True)


def _span(values: list[int]) -> str:
    values = sorted(values)
    return f"{values[0]} / {values[len(values) // 2]} / {values[-1]}" if values else ""
