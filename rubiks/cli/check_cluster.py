"""Check whether processes can train together, on one host or several, before hours are spent.

rubiks check-cluster trainer=ddp                                        all GPUs of this host
rubiks check-cluster trainer=ddp data=ssv2 data.root=/data/ssv2         also that the videos can be read
srun rubiks check-cluster trainer=ddp ...                               in a Slurm job
torchrun --nnodes=2 ... -m rubiks check-cluster trainer=ddp ...         on several hosts without Slurm
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from rubiks import assemble, continuing, launched, naming, parent, preflight, processes, runs, trainers, weights
from rubiks.choices import CommandLine, text_of
from rubiks.data import videos
from rubiks.data.records import VideoRecord
from rubiks.errors import InputError
from rubiks.experiment import Training
from rubiks.models import RubiksNet
from rubiks.preflight import Facts
from rubiks.processes import Member
from rubiks.runs import Run
from rubiks.stopping import Stop
from rubiks.training.position import Position

log = logging.getLogger(__name__)

BANDWIDTH_BYTES = 64_000_000


def check_cluster(settings: Training, config: dict[str, Any], command: CommandLine) -> None:
    """Print what the processes of a training are and how fast they exchange data, or why they cannot train together.

    Args:
        settings, config, command: as for `train`.
    """
    stop = Stop()
    if not launched.is_first():  # the first process reports on the data
        logging.getLogger("rubiks").setLevel(logging.ERROR)
    with stop.watching():
        run = naming.named_run(settings.run, command) or Run(runs.OUTPUTS / str(settings.run))
        manifest, source = videos.manifest_of(settings.data.source), settings.data.source.ready()
        classes = videos.class_names(source)
        train, _ = videos.records(source, settings.data.loading, "train", len(classes), manifest)
        val, _ = videos.records(source, settings.data.loading, "val", len(classes), manifest)
        net = weights.network(settings, classes, use_init=False)
        trainer = assemble.trainer(settings, [], stop, enable_checkpointing=False)
        if trainers.starts_processes(trainer):
            devices, nodes, timeout = trainer.num_devices, trainer.num_nodes, settings.process_timeout
            parent.run("check-cluster", devices, nodes, run.folder, command.choices, timeout)
            return
        member = processes.member()
        if member is None:
            raise InputError("there is only one process: choose trainer=ddp, or start several with torchrun or srun")
        facts = exchange(settings, config, trainer, net, train, val, run, Position())
        problems = preflight.problems(facts)
        answers: list[list[float]] = []
        if not problems:
            answers, problems = _answers(trainer, member, settings.connect_timeout)
        if member.place.rank == 0:
            _print(facts, answers, problems)
        if problems:
            processes.leave()
            sys.stdout.flush()
            os._exit(1)  # an all-reduce without an answer would keep the process


def check_together(
    settings: Training,
    config: dict[str, Any],
    trainer: pl.Trainer,
    net: RubiksNet,
    train: Sequence[VideoRecord],
    val: Sequence[VideoRecord],
    run: Run,
    start: Position,
) -> None:
    """Before a training: if there are several processes, check that they can train together, and connect them.

    Args:
        settings, config, trainer, net, train, val, run, start: as for `exchange`.

    Raises:
        InputError: they cannot.
    """
    member = processes.member()
    if member is None:
        return
    facts = exchange(settings, config, trainer, net, train, val, run, start)
    problems = preflight.problems(facts)
    if problems:
        raise InputError("\n- ".join([f"{len(facts)} processes cannot train together:", *problems]))
    preflight.connect(trainer, member.place, settings.connect_timeout)
    if member.place.rank == 0:
        for note in preflight.notes(facts):
            log.warning("%s", note)


def exchange(
    settings: Training,
    config: dict[str, Any],
    trainer: pl.Trainer,
    net: RubiksNet,
    train: Sequence[VideoRecord],
    val: Sequence[VideoRecord],
    run: Run,
    start: Position,
) -> list[Facts]:
    """State what this process trains, and read the same of all processes, in the order of ranks.

    Args:
        settings: what is trained.
        config: the configuration.
        trainer: Lightning's trainer.
        net: the network.
        train, val: the videos.
        run: the run; if its folder does not exist, the one above is checked.
        start: where training starts.
    """
    member = processes.member()
    assert member is not None
    chosen = {
        key: text_of(value)
        for key, value in continuing.flat(config).items()
        if not continuing.within(key, continuing.SILENT) and not key.endswith("_sha256")
    }
    lists = {f"{name} list": f"{len(own):,} videos, {videos.digest(own)[:12]}" for name, own in _named(train, val)}
    faults = [fault for name, own in _named(train, val) for fault in preflight.unreadable(name, own)]
    folder = next(folder for folder in (run.folder, runs.OUTPUTS, Path()) if folder.is_dir())
    if member.place.rank == 0 and not settings.trainer.fast_dev_run:
        faults += preflight.no_room(folder, _room(settings, net, run))
    equal = {**chosen, **lists, "start of training": str(start)}
    return preflight.exchange(member, trainer.strategy.root_device, equal, faults, folder)


def _named(train: Sequence[VideoRecord], val: Sequence[VideoRecord]) -> list[tuple[str, Sequence[VideoRecord]]]:
    return [("training", train), ("validation", val)]


def _room(settings: Training, net: RubiksNet, run: Run) -> int:
    """Bytes that the run's checkpoints will need, besides those that are there."""
    recipe, every = settings.recipe, settings.checkpoint.every_n_epochs
    copies = 1 + (2 if recipe.optimizer == "adamw" else 1) + (recipe.ema_decay is not None)
    state = 4 * copies * sum(parameter.numel() for parameter in net.parameters())
    files = 4 + (0 if every is None else recipe.epochs // every)  # best, last, previous, and the one being written
    present = sum(path.stat().st_size for path in run.checkpoints.glob("*.ckpt"))
    return max(0, files * state - present)


def _answers(trainer: pl.Trainer, member: Member, limit: float) -> tuple[list[list[float]], list[str]]:
    """Seconds of a small and of a large all-reduce in each process; or why there are none."""
    problem = ""
    try:
        preflight.connect(trainer, member.place, limit)
    except InputError as error:
        problem = str(error)
    problems = [text for text in member.board.gather(member.place.rank, "connection", problem, member.timeout) if text]
    if problems:
        return [], problems
    device = trainer.strategy.root_device
    own = [
        statistics.median(preflight.all_reduce(device, numbers=numbers) for _ in range(5))
        for numbers in (1, BANDWIDTH_BYTES // 4)
    ]
    return member.board.gather(member.place.rank, "all-reduce", own, member.timeout), []


def _print(facts: Sequence[Facts], answers: Sequence[Sequence[float]], problems: Sequence[str]) -> None:
    rows = [["process", "host", "device", "interface", "all-reduce", f"of {BANDWIDTH_BYTES // 10**6} MB"]]
    for own, times in zip(facts, answers or [()] * len(facts), strict=True):
        row = [str(own.rank), own.host, own.device, f"{own.interface} {own.address}"]
        if times:
            # Each process sends and receives this much, whatever the algorithm.
            moved = 2 * (len(facts) - 1) / len(facts) * BANDWIDTH_BYTES
            row += [f"{times[0] * 1e3:.2f} ms", f"{moved / times[1] / 1e9:.2f} GB/s"]
        rows.append([*row, *["-"] * (len(rows[0]) - len(row))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in preflight.notes(facts):
        print(f"Note: {note}")
    hosts = len({own.host for own in facts})
    processes = f"{len(facts)} processes on {hosts} host{'' if hosts == 1 else 's'}"
    print(f"{processes} {'cannot' if problems else 'can'} train together{':' if problems else ''}")
    for problem in problems:
        print(f"- {problem}")
