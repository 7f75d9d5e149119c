"""Train RubiksNet.

python train.py                                         tier tiny, on the built-in data set
python train.py tier=large variant=rubiks3d-aq data=ssv2 data.root=/data/ssv2
python train.py --help                                  everything that can be set
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint

from rubiks import assemble, runs, tracking
from rubiks.cli.entry import launch
from rubiks.errors import InputError
from rubiks.files import write_atomically
from rubiks.models import checkpoint
from rubiks.training.module import VideoClassifier
from rubiks.training.optim import describe_groups


def train(cfg: DictConfig) -> None:
    run = runs.Run(assemble.run_folder(cfg))
    recipe = assemble.recipe(cfg)
    attention = assemble.attention_schedule(cfg)
    rehearsal = bool(cfg.trainer.fast_dev_run)  # leaves nothing behind
    resume = None if rehearsal else unfinished(cfg, run, recipe.epochs)
    pl.seed_everything(assemble.whole_number("seed", cfg.seed, 0), verbose=False)

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
    net = assemble.network(cfg, classes, recipe.dropout)
    net.backbone.recorder.enabled = assemble.one_of("cuda_graphs", cfg.cuda_graphs, (True, False))
    config = {**assemble.plain(cfg), "manifest_sha256": manifest.digest}
    mixing = assemble.mixing(cfg, len(classes))
    module = VideoClassifier(net, recipe, classes, config, attention, mixing)

    trainer = assemble.trainer(
        cfg,
        [] if rehearsal else assemble.training_callbacks(run),
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        enable_checkpointing=not rehearsal,
    )
    if not rehearsal:  # everything has been checked: now the run's folder is filled
        trainer.loggers = tracking.loggers(cfg.logger, run, config, trainer.is_global_zero)
        if trainer.is_global_zero:
            write_atomically(run.config, lambda path: path.write_text(OmegaConf.to_yaml(cfg, resolve=True)))
    if trainer.is_global_zero:
        print(net)
        print(
            f"{cfg.data.name}: {len(train_videos):,} training and {len(val_videos):,} validation videos, "
            f"{len(classes)} classes, {cfg.data.num_frames} frames of {cfg.data.size} pixels"
        )
        print(describe_groups(net, recipe, trainer.world_size))
        if attention is not None:
            print(attention)
        print("Rehearsal" if rehearsal else f"{'Going on with' if resume else 'Run in'} {run.folder}", flush=True)
    gc.collect()
    gc.freeze()  # a step causes several collections: they need not go over all that has been imported
    try:
        trainer.fit(module, data, ckpt_path=None if resume is None else resume.path, weights_only=True)
    except BaseException as error:
        if trainer.is_global_zero and not rehearsal:
            if isinstance(error, SystemExit) and run.last.is_file():  # Lightning ends the program so on Ctrl-C
                print(f"Interrupted. To go on: python train.py run={run.folder.name} and the same choices as before")
            tracking.end(run, exit_code=1)
        raise
    finally:
        gc.unfreeze()
    if trainer.is_global_zero and not rehearsal:
        finish(run, trainer, recipe.epochs)


def unfinished(cfg: DictConfig, run: runs.Run, epochs: int) -> checkpoint.SavedNetwork | None:
    """The checkpoint that the run goes on from; None for a new run."""
    done = run.epochs_finished()
    if done is not None and done >= epochs:
        raise InputError(
            f"{run.folder} holds a finished run of {done} epochs; choose another run=, raise recipe.epochs to go on, "
            "or remove the folder"
        )
    if not run.last.is_file():
        return None
    saved = checkpoint.read(run.last)
    assemble.check_same_network(cfg, saved, "run")
    return saved


def finish(run: runs.Run, trainer: pl.Trainer, epochs: int) -> None:
    """Mark the run as finished, and say what came out and what to do next."""
    checkpoints = trainer.checkpoint_callback
    assert isinstance(checkpoints, ModelCheckpoint)
    best = checkpoints.best_model_score
    result = {"epochs": epochs, "best_val_top1": None if best is None else round(best.item(), 6)}
    write_atomically(run.finished, lambda path: path.write_text(json.dumps(result) + "\n"))
    if best is not None:
        print(f"Best validation top-1: {best:.1%}, in {run.best}")
    print("To evaluate: python eval.py protocol=two_clip", *assemble.choices_for_evaluation(), f"ckpt={run.folder}")
    tracking.end(run)


if __name__ == "__main__":
    launch(train, Path(__file__).parent / "conf", "train")
