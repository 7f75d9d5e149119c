"""`rubiks bench-data`: how fast a data set's videos are read here, and how many cores feed one GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rubiks
from rubiks.errors import InputError


def add_to(commands) -> None:
    """Add the subcommand to the parser's."""
    about = "measure how fast a core reads a data set's videos, where the time goes, and how many cores feed one GPU"
    parser = commands.add_parser("bench-data", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("choices", nargs="*", metavar="KEY=VALUE", help="as for train.py: data=ssv2 data.root=...")
    parser.add_argument("--videos", type=int, default=64, help="how many, spread over the list, default: %(default)s")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--readers", nargs="+", help="default: the one of data.reader")
    parser.add_argument("--clips-per-second", type=float, help="of the GPU; default: what an H200 was measured at")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from rubiks import assemble  # with Lightning it takes seconds to import
    from rubiks.cli.entry import compose
    from rubiks.data import speed
    from rubiks.data.estimate import describe_decoding_from_start, estimate
    from rubiks.data.readers import check_reader

    assemble.whole_number("--videos", arguments.videos, 1)
    cfg = compose(arguments.choices)
    readers = arguments.readers or [cfg.data.reader]
    for reader in readers:
        check_reader(reader)
    source = assemble.source(cfg)
    classes = assemble.class_names(cfg, source)
    records, _ = assemble.records(cfg, source, arguments.split, len(classes), assemble.manifest(cfg))
    if not records:
        raise InputError(f"data={cfg.data.name}: none of the {arguments.split} videos is there")
    recipe = assemble.recipe(cfg)
    views = assemble.training_views(cfg, classes, recipe.crop_scales)
    chosen = records[:: max(1, len(records) // arguments.videos)][: arguments.videos]

    report = Path(rubiks.__file__).resolve().parents[1] / "benchmarks" / "results" / "network_h200.json"
    needs = speed.measured_clips_per_second(report, cfg.tier.name, cfg.variant.name)
    origin = f"one H200 (benchmarks/results/{report.name}; clips of 8 x 224 x 224)"
    if arguments.clips_per_second is not None:
        if not 0 < arguments.clips_per_second < float("inf"):
            raise InputError(f"--clips-per-second must be a number above 0, got {arguments.clips_per_second}")
        needs, origin = {"the GPU": arguments.clips_per_second}, "--clips-per-second"
    facts = {"data": cfg.data.name, "tier": cfg.tier.name, "variant": cfg.variant.name, "rows": []}
    facts |= {"clips_per_second": needs, "clips_per_second_of": origin}
    for reader in readers:
        row = speed.with_cores(speed.measure(chosen, views, reader, recipe.batch_size), needs)
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
        rates = ", ".join(f"{phase} {rate:,.0f}" for phase, rate in needs.items()) or "not known"
        print(f"clips/s of tier={cfg.tier.name} variant={cfg.variant.name} by {origin}: {rates}")
