"""Evaluate RubiksNet under a named protocol.

rubiks eval protocol=two_clip                  the newest run on the built-in data set
rubiks eval run=NAME                           the best checkpoint of a run; results beside it
rubiks eval data=ssv2 data.root=/data/ssv2 protocol=two_clip ckpt=ssv2_large.pth.tar
rubiks eval temporal=true                      how much does the network use the order of frames?
rubiks eval save_predictions=scores.npz        logits (videos, classes), labels and names
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from rubiks import __version__, assemble, naming, parent, runs, tracking, trainers, weights
from rubiks.choices import CommandLine
from rubiks.data import videos
from rubiks.data.datamodule import VideoDataModule
from rubiks.errors import InputError, VideoError
from rubiks.evaluation import learned, metrics, previews, report, results
from rubiks.evaluation.collect import CollectPredictions
from rubiks.evaluation.predictions import Predictions
from rubiks.evaluation.protocols import Protocol
from rubiks.evaluation.scorer import Scorer
from rubiks.evaluation.table import print_results
from rubiks.experiment import Evaluation
from rubiks.export import exported
from rubiks.export.exported import ExportedNetwork
from rubiks.files import check_writable, sha256
from rubiks.models import RubiksNet
from rubiks.models.checkpoint import SavedNetwork
from rubiks.stopping import Interrupted, Stop

LOGGED = ("top1", "top5", "mean_class_accuracy", "calibration_error")  # in the summary of a W&B run
PACKAGES = {"pyav": "av"}  # of the libraries that read videos, where the name differs


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
            _evaluate(settings, config, command, run, stop)
        except Interrupted as interrupted:
            interrupted.message = interrupted.message or "there are no results yet"
            raise


def _evaluate(settings: Evaluation, config: dict[str, Any], command: CommandLine, run: runs.Run, stop: Stop) -> None:
    check_writable(run.folder / results.RESULTS)
    scores_file = assemble.predictions_file(settings)
    pl.seed_everything(settings.seed)
    saved = weights.evaluated(settings, command)
    net = exported.network(saved)
    protocol = settings.protocol_for(settings.data.sampling.resolve(dataclasses.asdict(saved.preprocessing)))
    if isinstance(net, ExportedNetwork):
        settings = _on_cpu(settings, net, protocol)

    manifest, source = videos.manifest_of(settings.data.source), settings.data.source.ready()
    classes = videos.class_names(source, saved.classes, saved.num_classes)
    weights.check_same_classes(saved, classes)
    listed, missing = videos.records(source, settings.data.loading, "val", len(classes), manifest)
    data = assemble.evaluation_data(settings, listed, protocol)

    collected = CollectPredictions()
    trainer = assemble.trainer(settings, [collected], stop, enable_checkpointing=False)
    if trainers.starts_processes(trainer):  # everything has been checked, once
        devices, nodes, timeout = trainer.num_devices, trainer.num_nodes, settings.process_timeout
        parent.run("eval", devices, nodes, run.folder, command.choices, timeout)
        return
    with tracking.evaluation(settings.logger, run, config, trainer.is_global_zero) as experiment:
        if trainer.is_global_zero:
            print(f"Evaluating {saved.path} on {len(listed):,} videos", flush=True)
        start = time.perf_counter()
        scorer = Scorer(net, protocol.mean, settings.orders, settings.seed)
        trainer.predict(scorer, data, return_predictions=False)
        seconds = time.perf_counter() - start
        if not trainer.is_global_zero:
            return
        names, labels = [listed[index].name for index in collected.indices.tolist()], collected.labels.numpy()
        by_order = [Predictions(names, labels, logits.numpy(), classes) for logits in collected.logits.unbind(1)]
        predictions = by_order[0]
        predictions.check(saved.path)
        numbers = {
            **results.measured(predictions),
            **_temporal(settings, by_order),
            "data": source.name,
            "list_sha256": videos.digest(listed),
            "manifest_sha256": manifest.digest,
            **protocol.facts(),
            "frame_order": settings.orders[0],
            **_counts(predictions, missing, collected),
            **_network(saved, net),
            "seconds": round(seconds, 2),
            "device": torch.cuda.get_device_name() if settings.on_gpu else "cpu",
            "precision": net.description.precision if isinstance(net, ExportedNetwork) else trainer.precision,
            "versions": _versions(collected.readers),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        _write(run.folder, numbers, predictions, scores_file)
        if settings.report:
            clip_of = _scored_clips(data, collected.indices.tolist(), protocol)
            _report(run.folder, predictions, clip_of, net.to(trainer.strategy.root_device), numbers["date"])
        if experiment is not None:
            files = [run.folder / name for name in (*results.FILES, report.REPORT)]
            scores = {name: numbers[name] for name in LOGGED}
            tracking.log_evaluation(experiment, run, protocol.name, scores, filter(Path.is_file, files))


def _on_cpu(settings: Evaluation, net: ExportedNetwork, protocol: Protocol) -> Evaluation:
    """The settings for an exported file; InputError if it cannot be evaluated with them."""
    net.check(settings.device, protocol.num_frames, protocol.size)
    if settings.precision not in ("auto", "32-true"):
        raise InputError(f"precision={settings.precision}, but {net.path} has its own; leave precision out")
    return settings.model_copy(update={"device": "cpu"})


def _write(folder: Path, numbers: dict[str, Any], predictions: Predictions, scores_file: Path | None) -> None:
    """Print the result and write its files."""
    print_results(numbers)
    report.clear(folder)
    results.write(folder, numbers, predictions)
    print(f"Results in {folder / results.RESULTS}")
    if scores_file is not None:
        results.write_scores(scores_file, predictions)
        print(f"Predictions in {scores_file}")


def _scored_clips(data: VideoDataModule, indices: list[int], protocol: Protocol) -> Callable[[int], Tensor | None]:
    """Reads the first clip's centre crop uint8 (T, 3, H, W) of the video at a place in the predictions once more."""
    dataset = data.dataset("val")

    def clip_of(place: int) -> Tensor | None:
        item = dataset[0, indices[place], 0]
        return None if isinstance(item, VideoError) else item["views"][protocol.central_view]

    return clip_of


def _report(
    folder: Path,
    predictions: Predictions,
    clip_of: Callable[[int], Tensor | None],
    net: RubiksNet | ExportedNetwork,
    date: str,
) -> None:
    """Write report.html and what it needs besides the results."""
    try:
        if isinstance(net, RubiksNet):  # an exported file has neither shifts nor maps to show
            learned.write(folder, net, date)
            previews.write(folder, predictions, clip_of, net.float().eval(), date)
        print(f"Report in {report.write(folder)}")
    except Interrupted as interrupted:
        interrupted.message = f"the results are written, the report is not: rubiks report {folder} writes it"
        raise


def _temporal(settings: Evaluation, by_order: list[Predictions]) -> dict[str, Any]:
    """Top-1 with the frames in other orders."""
    if not settings.temporal:
        return {}
    return {
        "temporal": {order: metrics.scores(own)["top1"] for order, own in zip(settings.orders, by_order, strict=True)}
    }


def _counts(predictions: Predictions, missing: list[str], collected: CollectPredictions) -> dict[str, Any]:
    """How many videos were scored, and which were not."""
    skipped = [*((path, "is missing") for path in missing), *collected.bad.items()]
    return {
        "videos": len(predictions),
        "listed": len(predictions) + len(skipped),
        "left_out": len(skipped),
        "skipped": [{"video": path, "reason": reason} for path, reason in skipped],
        "readers": collected.readers,
    }


def _network(saved: SavedNetwork | ExportedNetwork, net: RubiksNet | ExportedNetwork) -> dict[str, Any]:
    return {
        "tier": net.tier,
        "variant": net.variant,
        "num_classes": net.num_classes,
        **({"temporal_share": net.temporal_share()} if isinstance(net, RubiksNet) and net.attention_shifts() else {}),
        "checkpoint": saved.path,
        "checkpoint_sha256": sha256(saved.file),
        "epoch": saved.epoch if isinstance(saved, SavedNetwork) else None,
        **({"exported": net.facts()} if isinstance(net, ExportedNetwork) else {}),
    }


def _versions(readers: dict[str, int]) -> dict[str, str]:
    """Versions of this package, of PyTorch and of the libraries that read the videos."""
    libraries = {name: importlib.metadata.version(PACKAGES.get(name, name)) for name in readers}
    return {"rubiks": __version__, "torch": torch.__version__, **libraries}
