"""`rubiks browse`: a page of a data set's videos, what training makes of them, and which labels may be wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rubiks.cli import check, places
from rubiks.errors import InputError

if TYPE_CHECKING:
    from rubiks.data.browse import Suspect
    from rubiks.data.records import VideoRecord
    from rubiks.data.sources import Split
    from rubiks.evaluation.outcomes import Outcomes

SUSPECTS = 60  # videos whose labels may be wrong that are shown


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "write a page that shows a data set's videos by class, with moving previews"
    parser = commands.add_parser("browse", help=about, description=about[0].upper() + about[1:] + ".")
    check.add_arguments(parser, 60)
    parser.add_argument("--split", choices=("train", "val"), help="default: train, or val with --errors")
    parser.add_argument("--per-class", type=int, default=4, metavar="N", help="videos of a class, default: %(default)s")
    parser.add_argument(
        "--limit", type=int, default=2000, metavar="N", help="videos of all classes, default: %(default)s"
    )
    parser.add_argument(
        "--augmented", action="store_true", help="also show what training makes of one video of a class"
    )
    parser.add_argument(
        "--errors",
        metavar="RESULTS",
        help="also show labels that may be wrong: the most confident mistakes of an evaluation, which is a folder of "
        "rubiks eval, a file in it, a run in outputs, or the file of save_predictions=",
    )
    parser.add_argument("--out", type=Path, default="browse", metavar="FOLDER", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Choose videos, make previews, write the page."""
    from rubiks import assemble  # imports Lightning, which takes seconds
    from rubiks.cli.entry import training
    from rubiks.data import browse, videos
    from rubiks.data.sources import check_labels
    from rubiks.evaluation import outcomes

    workers = check.processes(arguments)
    for name in ("per_class", "limit"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    browse.check_folder(arguments.out)
    split: Split = arguments.split or ("train" if arguments.errors is None else "val")
    mistakes = None if arguments.errors is None else outcomes.read(places.evaluation(arguments.errors))
    settings = training(arguments.data)
    manifest, source = videos.manifest_of(settings.data.source), settings.data.source.ready()
    classes = videos.class_names(source)
    present, missing = source.records(split)
    check_labels(present, len(classes), getattr(source, f"{split}_list", None) or f"the {split} list")
    if not present:
        raise InputError(f"data={source.name}: none of the {len(missing):,} {split} videos is there; check data.root")
    records = manifest.apply(present)

    contents = browse.Contents(
        f"{source.name}, {'training' if split == 'train' else 'validation'} videos",
        classes,
        records,
        missing,
        browse.choose(records, arguments.per_class, arguments.limit),
        None if mistakes is None else suspects(mistakes, records, classes, split),
        assemble.training_views(settings, classes) if arguments.augmented else None,
    )
    loading = settings.data.loading
    with check.progress("Making previews", contents.previews) as advance:
        page = browse.write(arguments.out, contents, loading.reader, settings.seed, workers, arguments.timeout, advance)
    print(f"{len(records):,} videos of {len(classes):,} classes, {len(missing):,} missing", file=sys.stderr)
    print(f"Page in {page}")


def suspects(found: Outcomes, records: list[VideoRecord], classes: list[str], split: str) -> list[Suspect]:
    """The most confident mistakes.

    Raises:
        InputError: the predictions are not of these videos and classes.
    """
    from rubiks.data.browse import Suspect

    # Names as the files of evaluations have them.
    by_name = {record.name.encode(errors="backslashreplace").decode(): record for record in records}
    known = [own for own in found.predictions if own.name in by_name]
    if not known:
        raise InputError(
            f"{found.path} has no prediction for any video of the {split} list, its first video is "
            f"{found.predictions[0].name}; give --split, or the choices of data= that it was evaluated with"
        )
    names = [str(label) for label in range(len(classes))] if found.numbered else classes
    for own in known:
        label = names[by_name[own.name].label]
        if own.label != label:
            raise InputError(
                f"{found.path}: video {own.name} is of class {own.label!r} there, and of {label!r} in the data set; "
                "the list has changed, evaluate again"
            )
    mistakes = sorted((own for own in known if not own.correct), key=lambda own: -own.top[0][1])[:SUSPECTS]
    titles = dict(zip(names, classes, strict=True))
    return [Suspect(by_name[own.name], titles.get(own.top[0][0], own.top[0][0]), own.top[0][1]) for own in mistakes]
