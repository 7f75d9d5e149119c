"""Train RubiksNet.

python train.py                                         tier tiny, on the built-in data set
python train.py tier=large variant=rubiks3d-aq data=ssv2 data.root=/data/ssv2
python train.py --help                                  everything that can be set
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import shlex
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from rubiks import assemble, continuing, launched, processes, runs, tracking, trainers
from rubiks.choices import setting
from rubiks.cli.entry import launch
from rubiks.files import write_atomically, write_lines
from rubiks.stopping import Interrupted, Stop
from rubiks.training.module import VideoClassifier
from rubiks.training.optim import describe_groups
from rubiks.training.position import Position


def train(cfg: DictConfig) -> None:
    beat = processes.Beat() if processes.is_child() else None
    stop = Stop(quiet=not launched.is_first(), timeout=trainers.process_timeout(cfg), beat=beat)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.watching())
        rehearsal = bool(cfg.trainer.fast_dev_run)  # leaves nothing behind
        run = assemble.run(cfg)
        sweep = assemble.is_sweep()
        if sweep and run.epochs_finished() == cfg.recipe.epochs:
            print(f"{run.folder} is finished")
            return
        if not rehearsal and launched.is_first():
            stack.enter_context(run.locked())
        if not launched.is_first():  # the first has told what there is to tell of the data
            logging.getLogger("rubiks").setLevel(logging.ERROR)
        try:
            _train(cfg, run, stop, rehearsal)
        except Interrupted as interrupted:
            if run.last.is_file() and not rehearsal and launched.is_first():
                going_on = f"to go on: {continuing.command(run.folder, assemble.choices())}"
                interrupted.message = "; ".join(filter(None, [interrupted.message, going_on]))
            raise
        if sweep and stop.signal is not None:
            raise Interrupted(stop.signal, f"{run.folder} is done, the runs after it are not")


def _train(cfg: DictConfig, run: runs.Run, stop: Stop, rehearsal: bool) -> None:
    recipe = assemble.recipe(cfg)
    attention = assemble.attention_schedule(cfg)
    resume = None if rehearsal else assemble.unfinished(cfg, run, recipe.epochs)
    if resume is not None:  # before the lists are read, which may be others
        continuing.check(run, resume, {**resume.config, **assemble.plain(cfg)}, assemble.choices())
    pl.seed_everything(assemble.whole_number("seed", cfg.seed, 0))

    source = assemble.source(cfg)
    classes = assemble.class_names(cfg, source)
    if resume is not None:
        assemble.check_same_classes(resume, classes)
    manifest = assemble.manifest(cfg)
    train_videos, _ = assemble.records(cfg, source, "train", len(classes), manifest)
    val_videos, _ = assemble.records(cfg, source, "val", len(classes), manifest)
    views = assemble.training_views(cfg, classes, recipe.crop_scales)
    protocol = assemble.protocol(cfg, views.num_frames, views.size, views.window)
    balanced = assemble.one_of("data.balanced", cfg.data.balanced, (True, False))
    data = assemble.datamodule(
        cfg, train_videos, val_videos, views, protocol, recipe.batch_size, recipe.batch_size, balanced
    )
    config = {
        **assemble.plain(cfg),
        "manifest_sha256": manifest.digest,
        "train_sha256": assemble.digest(train_videos),
        "val_sha256": assemble.digest(val_videos),
    }
    found = [] if resume is None else continuing.check(run, resume, config, assemble.choices())
    net = assemble.network(cfg, classes, recipe.dropout, resume is None)
    net.recorder.enabled = assemble.one_of("cuda_graphs", cfg.cuda_graphs, (True, False))
    mixing = assemble.mixing(cfg, len(classes))

    other_score = any(continuing.within(change.key, continuing.SCORE) for change in found)
    callbacks = [] if rehearsal else trainers.training_callbacks(cfg, run, stop, keep_best=not other_score)
    trainer = trainers.trainer(
        cfg,
        callbacks,
        stop,
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        enable_checkpointing=not rehearsal,
    )
    start = (
        Position()
        if resume is None
        else continuing.start(resume, trainer, data, recipe.epochs, trainers.max_steps(cfg))
    )
    data.start_at(start.epoch, start.videos)
    module = VideoClassifier(net, recipe, classes, config, attention, mixing, cfg.seed, start)
    if trainers.starts_processes(trainer):  # everything has been checked, once
        timeout = trainers.process_timeout(cfg)
        stop.signal = processes.run(trainer.num_devices, trainer.num_nodes, run.folder, assemble.choices(), timeout)
        return
    if not rehearsal:  # now the run's folder is filled
        trainer.loggers = tracking.loggers(cfg.logger, run, config, trainer.is_global_zero)
        if trainer.is_global_zero:
            run.finished.unlink(missing_ok=True)
            if resume is not None and Path(resume.path) != run.last:  # damaged: it must not take the other's place
                run.last.unlink(missing_ok=True)
            write_atomically(run.config, lambda path: path.write_text(OmegaConf.to_yaml(cfg, resolve=True)))
            write_lines(run.choices, assemble.choices())
    if trainer.is_global_zero:
        print(net)
        print(
            f"{cfg.data.name}: {len(train_videos):,} training and {len(val_videos):,} validation videos, "
            f"{len(classes)} classes, {cfg.data.num_frames} frames of {cfg.data.size} pixels"
        )
        print(describe_groups(net, recipe, trainer.world_size))
        if attention is not None:
            print(attention)
        for change in found:
            if not continuing.within(change.key, continuing.SILENT):
                print(f"Changed since the run was last started: {change}")
        if other_score:
            print("Validation is not what it was: the best checkpoint is chosen from here on")
        going_on = "" if resume is None else f"Going on with {run.folder} after {start}"
        print("Rehearsal" if rehearsal else going_on or f"Run in {run.folder}", flush=True)
    logging.getLogger("rubiks").setLevel(logging.INFO if trainer.is_global_zero else logging.WARNING)
    gc.collect()
    gc.freeze()  # a step causes several collections: they need not go over all that has been imported
    try:
        trainer.fit(module, data, ckpt_path=None if resume is None else resume.path, weights_only=True)
    except BaseException:
        if trainer.is_global_zero and not rehearsal:
            tracking.end(run, exit_code=1)
        raise
    finally:
        gc.unfreeze()
    if trainer.is_global_zero and not rehearsal:
        finish(cfg, run, trainer, module.position or start)


def finish(cfg: DictConfig, run: runs.Run, trainer: pl.Trainer, position: Position) -> None:
    """Mark the run as finished if it is, and say what came out and what to do next."""
    best, epochs = trainers.checkpoints(trainer).best, cfg.recipe.epochs
    if position.epoch < epochs:
        print(f"Stopped after {position} of {epochs} epochs{trainers.reason(cfg, trainer)}")
        print(f"To go on: {continuing.command(run.folder, continuing.without_limits(assemble.choices()))}")
    else:
        result = {"epochs": epochs, "best_val_top1": None if best is None else round(best, 6)}
        write_atomically(run.finished, lambda path: path.write_text(json.dumps(result) + "\n"))
    if best is not None:
        print(f"Best validation top-1: {best:.1%}, in {run.best}")
    choices = [*assemble.choices_for_evaluation(), setting("ckpt", run.folder)]
    print("To evaluate:", shlex.join(["python", "eval.py", "protocol=two_clip", *choices]))
    tracking.end(run)


if __name__ == "__main__":
    launch(train, Path(__file__).parent / "conf", "train")
