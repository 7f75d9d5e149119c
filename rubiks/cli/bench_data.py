"""`rubiks bench-data`: how fast a data set's videos are read here, and how many cores feed one GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rubiks
from rubiks.errors import InputError


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "measure how fast one core reads a data set's videos, where the time goes, and how many cores one GPU needs"
    parser = commands.add_parser("bench-data", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("choices", nargs="*", metavar="KEY=VALUE", help="as for train.py, e.g. data=ssv2 data.root=...")
    parser.add_argument(
        "--videos", type=int, default=64, help="number of videos, spread over the list; default: %(default)s"
    )
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--readers", nargs="+", help="default: data.reader")
    parser.add_argument("--clips-per-second", type=float, help="speed of the GPU; default: as measured on an H200")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from rubiks import assemble  # imports Lightning, which takes seconds
    from rubiks.cli.entry import training
    from rubiks.data import speed, videos
    from rubiks.data.estimate import describe_decoding_from_start, estimate
    from rubiks.data.readers import check_reader

    if arguments.videos < 1:
        raise InputError(f"--videos must be a whole number of at least 1, got {arguments.videos}")
    settings = training(arguments.choices)
    tier, variant, loading = settings.tier.name, settings.variant.name, settings.data.loading
    readers = arguments.readers or [loading.reader]
    for reader in readers:
        check_reader(reader)
    manifest = videos.manifest_of(settings.data.source)
    source = settings.data.source.ready()
    classes = videos.class_names(source)
    records, _ = videos.records(source, loading, arguments.split, len(classes), manifest)
    if not records:
        raise InputError(f"data={source.name}: no {arguments.split} videos were found")
    views = assemble.training_views(settings, classes)
    chosen = records[:: max(1, len(records) // arguments.videos)][: arguments.videos]

    report = Path(rubiks.__file__).resolve().parents[1] / "benchmarks" / "results" / "network_h200.json"
    needs = speed.measured_clips_per_second(report, tier, variant)
    origin = f"one H200, benchmarks/results/{report.name}, clips of 8 x 224 x 224"
    if arguments.clips_per_second is not None:
        if not 0 < arguments.clips_per_second < float("inf"):
            raise InputError(f"--clips-per-second must be a number above 0, got {arguments.clips_per_second}")
        needs, origin = {"the GPU": arguments.clips_per_second}, "--clips-per-second"
    facts = {"data": source.name, "tier": tier, "variant": variant, "rows": []}
    facts |= {"clips_per_second": needs, "clips_per_second_of": origin}
    for reader in readers:
        row = speed.with_cores(speed.measure(chosen, views, reader, settings.recipe.batch_size), needs)
        facts["rows"].append(row)
        if not arguments.json:
            print(speed.describe(row), flush=True)
    slow = facts["rows"][0]["single_key_frame"], facts["rows"][0]["seeking_not_proven"]
    if any(slow):
        cost = estimate(chosen, "jpeg", reader=readers[0], from_start=True)
        facts["decoded_from_start"] = describe_decoding_from_start(*slow, facts["rows"][0]["videos"], cost)
    if arguments.json:
        print(json.dumps(facts, indent=1))
    else:
        if any(slow):
            print(facts["decoded_from_start"])
        rates = ", ".join(f"{phase} {rate:,.0f}" for phase, rate in needs.items()) or "unknown"
        print(f"clips/s of tier={tier} variant={variant} ({origin}): {rates}")
