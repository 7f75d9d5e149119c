"""Train RubiksNet.

rubiks train                                             tier tiny on the built-in data set, which is made at first use
rubiks train tier=large variant=rubiks3d-aq aq.budget=0.125 data=ssv2 data.root=/data/ssv2
rubiks train data=kinetics data.root=/data/k400 trainer=ddp       one process per GPU
rubiks train recipe=finetune init=kinetics_tiny.pth.tar           start from other weights
rubiks train variant=rubiks2d data=images data.root=/data/imagenet     pre-train on still images
rubiks train run=NAME          keep the run in outputs/NAME; the same command again resumes it
rubiks train -m seed=1,2,3     several runs, one after the other
rubiks train trainer.fast_dev_run=true         one batch, to check that everything works
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import shlex
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml

from rubiks import assemble, continuing, launched, naming, parent, processes, runs, tracking, trainers, weights
from rubiks.choices import CommandLine, program, setting
from rubiks.cli.check_cluster import check_together
from rubiks.data import videos
from rubiks.experiment import Training
from rubiks.files import write_lines, write_text
from rubiks.models import RubiksNet
from rubiks.models.checkpoint import SavedNetwork
from rubiks.stopping import Interrupted, Stop
from rubiks.training.module import VideoClassifier
from rubiks.training.optim import describe_groups
from rubiks.training.position import Epoch, Position, epoch_of
from rubiks.training.recipe import Recipe


def train(settings: Training, config: dict[str, Any], command: CommandLine) -> None:
    """Train a network, or resume a run.

    Args:
        settings: what is trained, and how.
        config: the configuration the settings were made from; it is kept in checkpoints.
        command: the command line, for the commands that are printed.
    """
    stop = Stop(quiet=not launched.is_first(), timeout=settings.process_timeout, beat=processes.member())
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.watching())
        rehearsal = bool(settings.trainer.fast_dev_run)  # leaves nothing behind
        run = naming.run_of(settings.run, command, rehearsal)
        sweep = command.job is not None
        if sweep and run.epochs_finished() == settings.recipe.epochs:
            print(f"{run.folder} is finished")
            return
        if not rehearsal and launched.is_first():
            stack.enter_context(run.locked())
        if not launched.is_first():  # the first process reports on the data
            logging.getLogger("rubiks").setLevel(logging.ERROR)
        try:
            _train(settings, config, command, run, stop, rehearsal)
        except Interrupted as interrupted:
            if run.last.is_file() and not rehearsal and launched.is_first():
                resuming = f"to resume: {continuing.command(run.folder, command.choices)}"
                interrupted.message = "; ".join(filter(None, [interrupted.message, resuming]))
            raise
        if sweep and stop.signal is not None:
            raise Interrupted(stop.signal, f"{run.folder} is finished, but the runs after it were not started")


def _train(
    settings: Training, config: dict[str, Any], command: CommandLine, run: runs.Run, stop: Stop, rehearsal: bool
) -> None:
    recipe, loading = settings.recipe, settings.data.loading
    resume = None if rehearsal else naming.unfinished(run, recipe.epochs)
    if resume is not None:  # before the lists are read, as they may have changed
        continuing.check(run, resume, {**resume.config, **config}, command.choices)
    pl.seed_everything(settings.seed)

    manifest, source = videos.manifest_of(settings.data.source), settings.data.source.ready()
    classes = videos.class_names(source)
    if resume is not None:
        weights.check_same_classes(resume, classes)
    train_videos, _ = videos.records(source, loading, "train", len(classes), manifest)
    val_videos, _ = videos.records(source, loading, "val", len(classes), manifest)
    data = assemble.training_data(settings, train_videos, val_videos, assemble.training_views(settings, classes))
    content = {
        **config,
        "manifest_sha256": manifest.digest,
        "train_sha256": videos.digest(train_videos),
        "val_sha256": videos.digest(val_videos),
    }
    found = [] if resume is None else continuing.check(run, resume, content, command.choices)
    net = weights.network(settings, classes, use_init=resume is None)
    net.recorder.enabled = settings.cuda_graphs

    other_score = any(continuing.within(change.key, continuing.SCORE) for change in found)
    callbacks = [] if rehearsal else assemble.training_callbacks(settings, run, stop, keep_best=not other_score)
    trainer = assemble.trainer(
        settings,
        callbacks,
        stop,
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        enable_checkpointing=not rehearsal,
        folder=None if rehearsal else run.folder,
    )
    processes_changed = ""
    if resume is not None:
        recipe, processes_changed = continuing.recipe_for(resume, recipe, trainer.world_size)
        trainer.accumulate_grad_batches = recipe.accumulate
    content |= {"processes": trainer.world_size, "total_batch": recipe.total_batch(trainer.world_size)}
    if not rehearsal:
        settings.trainer.check_interval(epoch_of(trainer, data).steps)
    max_steps = settings.trainer.limit()
    start = Position() if resume is None else continuing.start(resume, trainer, data, recipe.epochs, max_steps)
    data.start_at(start.epoch, start.videos)
    mixing = assemble.mixing(settings, len(classes))
    module = VideoClassifier(
        net, recipe, classes, content, settings.aq, mixing, settings.seed, start, settings.protocol.mean
    )
    if trainers.starts_processes(trainer):  # everything has been checked, once
        stop.signal = parent.run(
            "train", trainer.num_devices, trainer.num_nodes, run.folder, command.choices, settings.process_timeout
        )
        return
    check_together(settings, content, trainer, net, train_videos, val_videos, run, start)
    if not rehearsal:  # from here on, files are written to the run's folder
        trainer.loggers = tracking.loggers(settings.logger, run, content, trainer.is_global_zero)
        if trainer.is_global_zero:
            _begin(run, config, command, resume)
    if trainer.is_global_zero:
        _describe(settings, recipe, net, epoch_of(trainer, data), len(val_videos), len(classes))
        for change in found:
            if not continuing.within(change.key, continuing.SILENT):
                print(f"Changed since the run was last started: {change}")
        if processes_changed:
            print(processes_changed)
        if other_score:
            print("Validation scores cannot be compared with earlier ones: the best checkpoint is chosen from now on")
        started = f"Run in {run.folder}" if resume is None else f"Resuming {run.folder} after {start}"
        print("Trial run, nothing is saved" if rehearsal else started, flush=True)
    logging.getLogger("rubiks").setLevel(logging.INFO if trainer.is_global_zero else logging.WARNING)
    gc.collect()
    gc.freeze()  # a step causes several collections, which need not scan everything imported so far
    try:
        trainer.fit(module, data, ckpt_path=None if resume is None else resume.path, weights_only=True)
    except BaseException:
        if trainer.is_global_zero and not rehearsal:
            tracking.end(run, exit_code=1)
        raise
    finally:
        gc.unfreeze()
    if trainer.is_global_zero and not rehearsal:
        _finish(settings, command, run, trainer, module.position or start)


def _begin(run: runs.Run, config: dict[str, Any], command: CommandLine, resume: SavedNetwork | None) -> None:
    """Write to the run's folder what it is, before its first step."""
    run.finished.unlink(missing_ok=True)
    if resume is not None and Path(resume.path) != run.last:  # damaged: it must not become previous.ckpt
        run.last.unlink(missing_ok=True)
    write_text(run.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_lines(run.choices, command.choices)


def _describe(
    settings: Training, recipe: Recipe, net: RubiksNet, epoch: Epoch, val_videos: int, num_classes: int
) -> None:
    """Print what is trained: the network, the data, and the learning rates."""
    sampling = settings.data.sampling
    print(net)
    print(
        f"{settings.data.source.name}: {epoch.videos:,} training and {val_videos:,} validation videos, "
        f"{num_classes} classes, {sampling.num_frames} frames of {sampling.size} pixels"
    )
    if epoch.left_out:
        print(
            f"{epoch.left_out:,} of the {epoch.videos:,} training videos are left out of each epoch, others each time: "
            f"they do not fill a batch{' in every process' if epoch.processes > 1 else ''}"
        )
    print(describe_groups(net, recipe, epoch.processes))
    if settings.aq is not None:
        print(settings.aq)


def _finish(settings: Training, command: CommandLine, run: runs.Run, trainer: pl.Trainer, position: Position) -> None:
    """Mark the run as finished if it is, and print the result and what to do next."""
    best, epochs = trainers.checkpoints(trainer).best, settings.recipe.epochs
    if position.epoch < epochs:
        print(f"Stopped after {position} of {epochs} epochs{trainers.reason(settings.trainer, trainer)}")
        print(f"To resume: {continuing.command(run.folder, continuing.without_limits(command.choices))}")
    else:
        result = {"epochs": epochs, "best_val_top1": None if best is None else round(best, 6)}
        write_text(run.finished, json.dumps(result) + "\n")
    if best is not None:
        print(f"Best validation top-1: {best:.1%}, in {run.best}")
    profiles = trainers.profiles(run.folder)
    if settings.trainer.profiler is not None and profiles:
        print(f"Profile: {', '.join(map(str, profiles))}")
    choices = [*command.for_evaluation(), setting("ckpt", run.folder)]
    print("To evaluate:", shlex.join([*program("eval"), "protocol=two_clip", *choices]))
    tracking.end(run)
