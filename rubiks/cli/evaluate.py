"""Evaluate RubiksNet under a named protocol.

rubiks eval protocol=two_clip                  the newest run on the built-in data set
rubiks eval run=NAME                           the best checkpoint of a run; results beside it
rubiks eval data=ssv2 data.root=/data/ssv2 protocol=two_clip ckpt=ssv2_large.pth.tar
rubiks eval frame_order=shuffled               how much does the network use the order of frames?
rubiks eval save_predictions=scores.npz        logits (videos, classes), labels and names
"""

from __future__ import annotations

import datetime
import time
from typing import Any

import pytorch_lightning as pl
import torch

from rubiks import __version__, assemble, naming, parent, runs, trainers, weights
from rubiks.choices import CommandLine
from rubiks.data import videos
from rubiks.evaluation import report
from rubiks.evaluation.collect import CollectPredictions
from rubiks.experiment import Evaluation
from rubiks.files import check_writable
from rubiks.models import RubiksNet
from rubiks.stopping import Interrupted, Stop
from rubiks.training.module import VideoClassifier


def evaluate(settings: Evaluation, config: dict[str, Any], command: CommandLine) -> None:
    """Score a checkpoint's network, print the result and write it to the run's folder.

    Args:
        settings: what is evaluated, and how.
        config: the configuration the settings were made from.
        command: the command line.
    """
    stop = Stop()
    run = naming.run_of(settings.run, command, bool(settings.trainer.fast_dev_run))
    with stop.watching(), run.made():
        try:
            _evaluate(settings, command, run, stop)
        except Interrupted as interrupted:
            interrupted.message = "there are no results yet"
            raise


def _evaluate(settings: Evaluation, command: CommandLine, run: runs.Run, stop: Stop) -> None:
    results_file = run.folder / "results.json"
    check_writable(results_file)
    predictions_file = assemble.predictions_file(settings)
    pl.seed_everything(settings.seed)
    saved = weights.evaluated(settings, command)
    net = RubiksNet.from_saved(saved)
    sampling = settings.data.sampling.resolve(saved.config.get("data", {}), saved.num_frames)

    manifest, source = videos.manifest_of(settings.data.source), settings.data.source.ready()
    classes = videos.class_names(source, saved.classes, saved.num_classes)
    weights.check_same_classes(saved, classes)
    listed, missing = videos.records(source, settings.data.loading, "val", len(classes), manifest)
    protocol = assemble.protocol(settings, sampling, settings.frame_order)
    data = assemble.evaluation_data(settings, listed, protocol)

    predictions = CollectPredictions()
    trainer = assemble.trainer(settings, [predictions], stop, enable_checkpointing=False)
    if trainers.starts_processes(trainer):  # everything has been checked, once
        devices, nodes, timeout = trainer.num_devices, trainer.num_nodes, settings.process_timeout
        parent.run("eval", devices, nodes, run.folder, command.choices, timeout)
        return
    if trainer.is_global_zero:
        print(f"Evaluating {saved.path} on {len(listed):,} videos", flush=True)
    start = time.perf_counter()
    trainer.predict(VideoClassifier(net), data, return_predictions=False)
    seconds = time.perf_counter() - start
    if not trainer.is_global_zero:
        return

    scored = len(predictions.indices)
    results = {
        **report.accuracies(predictions.logits, predictions.labels),
        "data": source.name,
        "manifest_sha256": manifest.digest,
        "protocol": protocol.name,
        "clips": protocol.clips,
        "crops": protocol.crops,
        "frame_order": protocol.frame_order,
        "sampling": sampling.sampling,
        "window": sampling.span,
        "num_frames": sampling.num_frames,
        "size": sampling.size,
        "videos": scored,
        "listed": len(listed) + len(missing),
        "left_out": len(listed) + len(missing) - scored,
        "tier": net.tier,
        "variant": net.variant,
        "num_classes": net.num_classes,
        **({"temporal_share": net.temporal_share()} if net.attention_shifts() else {}),
        "checkpoint": saved.path,
        "epoch": saved.epoch,
        "seconds": round(seconds, 2),
        "device": torch.cuda.get_device_name() if settings.on_gpu else "cpu",
        "precision": trainer.precision,
        "versions": {"rubiks": __version__, "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    report.print_table(results)
    report.write_results(results_file, results)
    print(f"Results in {results_file}")
    if predictions_file is not None:
        names = [listed[index].name for index in predictions.indices.tolist()]
        report.write_predictions(predictions_file, predictions.logits, predictions.labels, names)
        print(f"Predictions in {predictions_file}")
