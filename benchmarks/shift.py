"""Speed of the compiled shift operator against a device copy and against the PyTorch reference.

    python benchmarks/shift.py [--dtypes float32 bfloat16] [--layouts contiguous channel-major] [--json FILE]

The shapes are those of the large network's shifts for clips of 8 frames of 224 pixels. On a GPU, several calls on
different tensors are captured in a CUDA graph and replayed, so that neither launches nor the cache affect the times,
which are medians over replays, per call. A copy moves each byte twice (read and written); forward moves x and the
output once, backward x, the upstream gradient and the gradient of x. On a CPU only the times and their ratio to the
reference are given. The JSON file is rewritten after every shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rubiks.ops import library, operator, reference

# Channels, height and width of x, spatial stride.
SHAPES = [(72, 112, 1), (72, 112, 2), (72, 56, 1), (144, 28, 1), (288, 14, 1), (576, 7, 1)]
FRAMES = 8
PADDING = (0, 0, 0)
CACHE = 800e6  # bytes of inputs that a graph goes through: many times a GPU's cache


def replayed(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Median milliseconds of one call, of all calls captured together in a CUDA graph."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    del kept
    return statistics.median(times[3:]) / len(calls)


def called(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a call that cannot be captured."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def copy_bandwidth(repeats: int) -> dict[str, float]:
    """TB/s of a copy of 1 GiB, by the driver's copy and by an elementwise kernel, which is faster on some GPUs."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    calls = {"copy_": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}
    return {name: 2 * 2**30 / replayed([call], repeats) / 1e9 for name, call in calls.items()}


def tensors(clips: int, channels: int, size: int, dtype: torch.dtype, layout: str, device: str) -> Tensor:
    if layout == "contiguous":
        return torch.randn(clips, FRAMES, channels, size, size, device=device).to(dtype)
    return torch.randn(channels, clips, FRAMES, size, size, device=device).to(dtype).permute(1, 2, 0, 3, 4)


def measure(shape: tuple[int, int, int], dtype: torch.dtype, layout: str, arguments: argparse.Namespace) -> dict:
    channels, size, step = shape
    device = arguments.device
    clips = arguments.clips
    stride = (1, step, step)
    out_size = (size - 1) // step + 1
    x_bytes = clips * FRAMES * channels * size**2 * dtype.itemsize
    out_bytes = x_bytes * out_size**2 // size**2
    sets = max(2, min(32, round(CACHE / x_bytes))) if device == "cuda" else 1
    xs = [tensors(clips, channels, size, dtype, layout, device) for _ in range(sets)]
    grads = [tensors(clips, channels, out_size, dtype, layout, device) for _ in range(sets)]
    shift = torch.rand(3, channels, device=device) * 2 - 1

    def forward(function, i):
        return lambda: function(xs[i], shift, stride, PADDING, False)

    def backward(function, i):
        return lambda: function(grads[i], xs[i], shift, stride, PADDING, False, True, True)

    row: dict[str, Any] = {
        "channels": channels,
        "size": size,
        "stride": step,
        "layout": layout,
        "dtype": str(dtype)[6:],
    }
    for name, make, bytes_moved in (
        ("forward", forward, x_bytes + out_bytes),
        ("backward", backward, 2 * x_bytes + out_bytes),
    ):
        ours = getattr(torch.ops.rubiks, {"forward": "shift", "backward": "shift_backward"}[name])
        theirs = getattr(reference, name)
        if device == "cuda":
            duration = replayed([make(ours, i) for i in range(sets)], arguments.repeats)
            row[f"{name}_tb_per_s"] = bytes_moved / duration / 1e9
        else:
            duration = called(make(ours, 0), arguments.repeats)
        row[f"{name}_ms"] = duration
        slow = max(arguments.repeats // 3, 3)
        row[f"{name}_over_reference"] = called(make(theirs, 0), slow) / duration
        if arguments.compiled:
            torch._dynamo.reset()
            row[f"{name}_over_compiled_reference"] = called(make(torch.compile(theirs), 0), slow) / duration
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the compiled shift operator.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--clips", type=int, help="default 32 on a GPU, 2 on a CPU")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layouts", nargs="+", default=["contiguous", "channel-major"])
    parser.add_argument("--compiled", action="store_true", help="also the ratio to the reference under torch.compile")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    command = [word for word in sys.argv[1:] if word not in ("--json", str(arguments.json))]
    arguments.clips = arguments.clips or (32 if arguments.device == "cuda" else 2)
    operator.prepare()
    if not library.load().compiled(arguments.device.upper()):
        sys.exit(f"error: the PyTorch reference serves {arguments.device} here; `rubiks info` says why")
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/shift.py", *command]),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": [],
    }
    print(report["device"], report["torch"])
    if arguments.device == "cuda":
        copies = report["copy_tb_per_s"] = copy_bandwidth(arguments.repeats)
        print("  ".join(f"{name} {value:.2f} TB/s" for name, value in copies.items()))
    for layout in arguments.layouts:
        for dtype in arguments.dtypes:
            for shape in SHAPES:
                row = measure(shape, getattr(torch, dtype), layout, arguments)
                text = [f"{layout} {dtype} {shape[0]:3} x {shape[1]}^2 / {shape[2]}:"]
                for name in ("forward", "backward"):
                    text.append(f"{name} {row[f'{name}_ms']:.3f} ms")
                    if arguments.device == "cuda":
                        rate = row[f"{name}_tb_per_s"]
                        shares = {key: rate / value for key, value in copies.items()}
                        row[f"{name}_share_of_copy"] = shares
                        text.append(f"{rate:.2f} TB/s = {shares['copy_']:.0%} ({shares['kernel']:.0%}) of a copy")
                    text.append(f"x{row[f'{name}_over_reference']:.1f}")
                    if arguments.compiled:
                        text.append(f"(compiled x{row[f'{name}_over_compiled_reference']:.1f})")
                print(*text, flush=True)
                report["rows"].append(row)
                if arguments.json:
                    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
