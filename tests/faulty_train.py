"""train.py with a fault at one place, for tests: FAULT="STEP RANK EPOCH BATCH WHAT" in the environment.

STEP is training or validation; WHAT is raise, input, nan, a signal that the process sends to itself (SIGKILL, SIGTERM,
...), worker (a loader process is killed), hang, or wait, for one second; both print "inside" first, so that a test can
act meanwhile.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rubiks.cli.entry import launch  # noqa: E402
from rubiks.cli.train import train  # noqa: E402
from rubiks.errors import InputError  # noqa: E402
from rubiks.experiment import Training  # noqa: E402
from rubiks.training.module import VideoClassifier  # noqa: E402


def insert(step_name: str, rank: str, epoch: str, batch: str, what: str) -> None:
    original = getattr(VideoClassifier, f"{step_name}_step")

    def step(self, data, index):
        loss = original(self, data, index)
        here = self.global_rank, self.current_epoch, index
        if not self.trainer.sanity_checking and here == (int(rank), int(epoch), int(batch)):
            match what:
                case "raise":
                    raise ValueError("the fault of the test")
                case "input":
                    raise InputError("the input of the test is bad")
                case "nan":
                    loss = loss * float("nan")
                case "hang" | "wait":
                    print("inside", flush=True)
                    time.sleep(1e6 if what == "hang" else 1)
                case "worker":
                    os.kill(self.trainer.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)
                case _:
                    os.kill(os.getpid(), getattr(signal, what))
        return loss

    setattr(VideoClassifier, f"{step_name}_step", step)


if __name__ == "__main__":
    if "FAULT" in os.environ:
        insert(*os.environ["FAULT"].split())
    launch(train, Training)
