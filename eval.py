"""Evaluate RubiksNet under a named protocol.

python eval.py                                          the newest run on the built-in data set
python eval.py protocol=two_clip data=ssv2 data.root=/data/ssv2 ckpt=ssv2_large.pth.tar
python eval.py --help                                   everything that can be set
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from rubiks import __version__, assemble, processes, runs, trainers
from rubiks.cli.entry import launch
from rubiks.evaluation import report
from rubiks.evaluation.collect import CollectPredictions
from rubiks.files import check_writable
from rubiks.models import RubiksNet
from rubiks.stopping import Interrupted, Stop
from rubiks.training.module import VideoClassifier


def evaluate(cfg: DictConfig) -> None:
    stop = Stop()
    run = assemble.run(cfg)
    with stop.watching(), run.made():
        try:
            _evaluate(cfg, run, stop)
        except Interrupted as interrupted:
            interrupted.message = "there are no results yet"
            raise


def _evaluate(cfg: DictConfig, run: runs.Run, stop: Stop) -> None:
    results_file = run.folder / "results.json"
    check_writable(results_file)
    predictions_file = assemble.predictions_file(cfg)
    pl.seed_everything(assemble.whole_number("seed", cfg.seed, 0))
    saved = assemble.evaluated_checkpoint(cfg)
    net = RubiksNet.from_saved(saved)
    trained = saved.config.get("data", {})
    size = cfg.data.size or trained.get("size", assemble.OFFICIAL_SIZE)
    num_frames = assemble.whole_number("data.num_frames", cfg.data.num_frames or saved.num_frames, 1)
    sampling = cfg.data.sampling or trained.get("sampling", "uniform")
    window = assemble.dense_window(sampling, cfg.data.window or trained.get("window", 64), num_frames)

    source = assemble.source(cfg)
    classes = assemble.class_names(cfg, source, saved)
    assemble.check_same_classes(saved, classes)
    manifest = assemble.manifest(cfg)
    videos, missing = assemble.records(cfg, source, "val", len(classes), manifest)
    protocol = assemble.protocol(cfg, num_frames, size, window, cfg.frame_order)
    batch_size = assemble.whole_number("batch_size", cfg.batch_size, 1)
    data = assemble.datamodule(cfg, [], videos, protocol, protocol, batch_size, batch_size)

    predictions = CollectPredictions()
    trainer = trainers.trainer(cfg, [predictions], stop, enable_checkpointing=False)
    if trainers.starts_processes(trainer):  # everything has been checked, once
        timeout = trainers.process_timeout(cfg)
        processes.run(trainer.num_devices, trainer.num_nodes, run.folder, assemble.choices(), timeout, steps=False)
        return
    if trainer.is_global_zero:
        print(f"Evaluating {saved.path} on {len(videos):,} videos", flush=True)
    start = time.perf_counter()
    trainer.predict(VideoClassifier(net), data, return_predictions=False)
    seconds = time.perf_counter() - start
    if not trainer.is_global_zero:
        return

    scored = len(predictions.indices)
    results = {
        **report.accuracies(predictions.logits, predictions.labels),
        "data": cfg.data.name,
        "manifest_sha256": manifest.digest,
        "protocol": protocol.name,
        "clips": protocol.clips,
        "crops": protocol.crops,
        "frame_order": protocol.frame_order,
        "sampling": sampling,
        "window": window,
        "num_frames": num_frames,
        "size": size,
        "videos": scored,
        "listed": len(videos) + len(missing),
        "left_out": len(videos) + len(missing) - scored,
        "tier": net.tier,
        "variant": net.variant,
        "num_classes": net.num_classes,
        **({"temporal_share": net.temporal_share()} if net.attention_shifts() else {}),
        "checkpoint": saved.path,
        "epoch": saved.epoch,
        "seconds": round(seconds, 2),
        "device": torch.cuda.get_device_name() if assemble.on_gpu(cfg) else "cpu",
        "precision": trainer.precision,
        "versions": {"rubiks": __version__, "torch": torch.__version__},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    report.print_table(results)
    report.write_results(results_file, results)
    print(f"Results in {results_file}")
    if predictions_file is not None:
        names = [videos[index].name for index in predictions.indices.tolist()]
        report.write_predictions(predictions_file, predictions.logits, predictions.labels, names)
        print(f"Predictions in {predictions_file}")


if __name__ == "__main__":
    launch(evaluate, Path(__file__).parent / "conf", "eval")
