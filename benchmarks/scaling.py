"""How training scales with the number of processes: clips a second, efficiency, and where the time of a step goes.

    python benchmarks/scaling.py [--processes 1 2 4 8] [--tier large] [--variant rubiks3d] [--batch 32]
                                 [--inputs memory prepared] [--scalings weak strong] [--json FILE] [--plot FILE]

Trains on the GPUs of this host, one process on each, or in processes on the CPU (gloo), as train.py does: the same
settings, trainer, strategy, callbacks and loaders, started by torchrun if there are several. Input `memory` is one
batch in (pinned) memory, the same in each step; `prepared` are built-in videos as `rubiks prepare` writes them. Weak
scaling keeps --batch clips in each process; strong scaling shares them among the processes. The efficiency is the rate
per process over that of the smallest number of processes, with the same scaling and input, in the same run.

A step's parts, as means over --steps steps and all processes:

    data            from the end of the step before until the batch is on the device
    compute         forward and backward pass, optimiser and callbacks
    communication   averaging the gradients, in the process that comes last and so waits for nobody
    waiting         averaging the gradients, in the others: as much longer as they wait for the last one

On a GPU the times are between CUDA events on the stream that trains, so that CPU work under which the GPU is busy does
not count; on a CPU they are from the monotonic clock. On a CPU each process has as many threads as the largest number
of processes leaves to each. Failures are reported, and the rest continues.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from network import machine
from pytorch_lightning.callbacks import Callback

from data import prepared
from rubiks import assemble, weights
from rubiks.cli import entry
from rubiks.data import builtin
from rubiks.data.batches import collate
from rubiks.data.workers import cores
from rubiks.models import TIERS
from rubiks.runs import Run
from rubiks.stopping import Stop
from rubiks.training.module import VideoClassifier

INPUTS = ("memory", "prepared")
SCALINGS = ("weak", "strong")
PARTS = ("data", "compute", "communication", "waiting")
VIDEOS = 64  # built-in ones, repeated


# ---- in each process that trains


class Clock(Callback):
    """Notes when each step begins, when its gradients are there, when they are averaged, and when it ends."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._gpu = module.device.type == "cuda"
        average = trainer.strategy.post_backward

        def timed(closure_loss: torch.Tensor) -> None:
            self._mark()
            average(closure_loss)
            self._mark()

        trainer.strategy.post_backward = timed  # type: ignore[method-assign]

    def on_train_batch_start(self, *_: Any) -> None:
        self._mark()

    def on_train_batch_end(self, *_: Any) -> None:
        self._mark()

    def _mark(self) -> None:
        mark: Any = time.monotonic()
        if self._gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append(mark)

    def intervals(self) -> list[float]:
        """Milliseconds between successive marks."""
        if not self._gpu:
            return [1e3 * (end - start) for start, end in itertools.pairwise(self.marks)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(self.marks)]


class Repeated:
    """A loader that gives one batch again and again."""

    waited = 0.0

    def __init__(self, batch: dict[str, Any], batches: int) -> None:
        self._batch, self._batches = batch, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self._batches):
            yield dict(self._batch)  # the data module takes things out


def train(choices: list[str], batches: int, source: str, records: str, folder: str) -> None:
    """Train for so many batches, and write the times of each step to a file of this process in the folder.

    Args:
        choices: of train.py.
        batches: optimiser steps.
        source: one of INPUTS.
        records: the file with the prepared videos.
        folder: where to write.
    """
    settings = entry.training(choices)
    classes, size = builtin.class_names("plain"), settings.recipe.batch_size
    videos = itertools.cycle(pickle.loads(Path(records).read_bytes()))
    listed = list(itertools.islice(videos, batches * size * settings.processes[0]))
    data = assemble.training_data(settings, listed, [], assemble.training_views(settings, classes))
    if source == "memory":
        batch = collate([data.dataset("train")[0, index, 0] for index in range(size)])
        if settings.on_gpu:
            batch |= {name: value.pin_memory() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        loader = Repeated(batch, batches)
        data.train_dataloader = lambda: loader  # type: ignore[method-assign,assignment,return-value]
    net = weights.network(settings, classes)
    net.recorder.enabled = settings.cuda_graphs
    stop, clock = Stop(timeout=settings.process_timeout), Clock()
    callbacks = [*assemble.training_callbacks(settings, Run(Path(folder, "run")), stop), clock]
    trainer = assemble.trainer(settings, callbacks, stop, max_epochs=1)
    trainer.fit(VideoClassifier(net, settings.recipe, classes, attention=settings.aq), data)
    Path(folder, f"times-{trainer.global_rank}.json").write_text(json.dumps(clock.intervals()))


# ---- in the process that starts them


def launch(setting: dict[str, Any], arguments: argparse.Namespace, work: Path) -> list[list[float]]:
    """Train in separate processes; the intervals of each one's `Clock`.

    Raises:
        subprocess.CalledProcessError: a process failed.
    """
    count, batches = setting["processes"], arguments.warmup + arguments.steps
    choices = [
        f"tier={arguments.tier}", f"variant={arguments.variant}", f"data.size={arguments.size}",
        f"data.num_frames={arguments.frames}", f"recipe.batch_size={setting['batch']}", "recipe.epochs=1",
        f"device={'gpu' if arguments.device == 'cuda' else 'cpu'}", f"trainer={'default' if count == 1 else 'ddp'}",
        "trainer.limit_val_batches=0", f"data.workers={arguments.workers}",
    ]  # fmt: skip
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    threads = max(1, cores() // max(arguments.processes))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        task = [choices, batches, setting["input"], str(work / "records"), folder]
        subprocess.run(
            [*command, __file__, "--train", json.dumps(task)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=True,
            capture_output=True,
            text=True,
        )
        return [json.loads(Path(folder, f"times-{rank}.json").read_text()) for rank in range(count)]


def parts(intervals: Sequence[Sequence[float]], warmup: int) -> dict[str, float]:
    """Milliseconds of a step's parts, from the intervals of all processes: compute, averaging, compute, data, ..."""
    # (processes, steps, 4), from the end of one step to the end of the next
    times = torch.tensor([own[3:] for own in intervals], dtype=torch.float64).unflatten(1, (-1, 4))[:, warmup - 1 :]
    data, before, averaging, after = times.unbind(2)
    communication = averaging.amin(0).expand_as(averaging)
    waiting = averaging - communication
    found = dict(zip(PARTS, (data, before + after, communication, waiting), strict=True))
    return {name: part.mean().item() for name, part in found.items()}


def measure(setting: dict[str, Any], arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The row of one scaling, input and number of processes, with its numbers or its error."""
    try:
        times = parts(launch(setting, arguments, work), arguments.warmup)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip("= -")] or [str(error)]
        return setting | {"error": next((line for line in lines if "rror: " in line), lines[-1])}
    step = sum(times.values())
    rate = 1e3 * setting["processes"] * setting["batch"] / step
    return setting | {"clips_per_second": rate, "step_ms": step} | {f"{name}_ms": times[name] for name in PARTS}


def settings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What to measure, in order."""
    return [
        {
            "scaling": scaling,
            "input": source,
            "processes": count,
            "batch": arguments.batch if scaling == "weak" else arguments.batch // count,
        }
        for scaling, source, count in itertools.product(arguments.scalings, arguments.inputs, arguments.processes)
    ]


def with_efficiency(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the rate per process over that of the first row of the same scaling and input."""
    first: dict[tuple[str, str], float] = {}
    found = []
    for row in rows:
        if "error" not in row:
            each = row["clips_per_second"] / row["processes"]
            row = row | {"efficiency": each / first.setdefault((row["scaling"], row["input"]), each)}
        found.append(row)
    return found


def text(row: dict[str, Any]) -> str:
    head = f"{row['scaling']:<8}{row['input']:<10}{row['processes']:>9} x {row['batch']:<5}"
    if "error" in row:
        return f"{head}failed: {row['error']}"
    times = "".join(f"{row[f'{name}_ms']:>{len(name) + 4}.2f}" for name in ("step", *PARTS))
    return f"{head}{row['clips_per_second']:>9.1f}{row['efficiency']:>12.3f}{times}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Efficiency against the number of processes, and the parts of each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in rows if "error" not in row]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for key, group in itertools.groupby(good, lambda row: (row["scaling"], row["input"])):
        own = list(group)
        left.plot([row["processes"] for row in own], [row["efficiency"] for row in own], "o-", label=", ".join(key))
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="processes", ylabel="efficiency")
    left.set_ylim(bottom=0)
    left.xaxis.get_major_locator().set_params(integer=True)
    if good:
        left.legend()
    names = [f"{row['scaling']}, {row['input']}, {row['processes']} x {row['batch']}" for row in good]
    bottom = [0.0] * len(good)
    for part in PARTS:
        heights = [row[f"{part}_ms"] for row in good]
        right.barh(names, heights, left=bottom, label=part)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    right.invert_yaxis()
    right.set_xlabel("milliseconds of a step")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(PARTS))
    figure.savefig(path)
    pyplot.close(figure)


def make_videos(work: Path) -> None:
    """Make the built-in videos, prepare them, and write a file with their records."""
    source = entry.training([f"data.root={work}", f"data.train_videos={VIDEOS}", "data.val_videos=8"]).data.source
    with contextlib.redirect_stdout(sys.stderr):
        listed, _ = source.ready().records("train")
        records = prepared(listed, work / "prepared", "jpeg")
    (work / "records").write_bytes(pickle.dumps(records))


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print and write everything."""
    command = " ".join(["python benchmarks/scaling.py", *sys.argv[1:]])
    report: dict[str, Any] = {"command": command, **machine(arguments.device), "cores": cores()}
    report["nccl"] = torch.cuda.nccl.version() if arguments.device == "cuda" else None
    report |= {key: value for key, value in vars(arguments).items() if key not in ("json", "plot", "device")}
    columns = "".join(f"{name:>{len(name) + 4}}" for name in ("step", *PARTS))
    print(f"{report['device']}, PyTorch {report['torch']}, {arguments.tier} {arguments.variant}\n")
    print(f"{'scaling':<8}{'input':<10}{'processes':>9} x {'batch':<5}{'clips/s':>9}{'efficiency':>12}{columns}, ms")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rubiks-") as folder:
        make_videos(Path(folder))
        for setting in settings(arguments):
            rows = with_efficiency([*rows, measure(setting, arguments, Path(folder))])
            print(text(rows[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
            if arguments.plot:
                plot(rows, arguments.plot)
    return rows


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    there = torch.cuda.device_count() if cuda else 2
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", help="default 1, 2, 4, ... GPUs; on a CPU 1 2")
    parser.add_argument("--tier", choices=tuple(TIERS), default="large" if cuda else "tiny")
    parser.add_argument("--variant", default="rubiks3d")
    parser.add_argument("--batch", type=int, default=32 if cuda else 4, help="clips; default 32, on a CPU 4")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--scalings", nargs="+", choices=SCALINGS, default=list(SCALINGS))
    parser.add_argument("--steps", type=int, default=50 if cuda else 10, help="measured; default 50, on a CPU 10")
    parser.add_argument("--warmup", type=int, default=10 if cuda else 2, help="steps before them, at least 1")
    parser.add_argument("--workers", default="auto", help="loader processes of each process, as data.workers")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=224 if cuda else 112)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="write a figure to this file, for example scaling.png")
    arguments = parser.parse_args(words)
    arguments.processes = sorted(arguments.processes or [2**power for power in range(there.bit_length())])
    if arguments.warmup < 1 or min(arguments.processes) < 1:
        parser.error("--warmup and --processes must be at least 1")
    if "strong" in arguments.scalings and any(arguments.batch % count for count in arguments.processes):
        parser.error(f"strong scaling shares --batch {arguments.batch} among all of --processes: choose a multiple")
    return arguments


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*json.loads(sys.argv[2]))
    else:
        run(parse())
