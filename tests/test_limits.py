"""The messages when the machine's limits end a loader's workers: full shared memory, and kills."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import forked
import pytest
import torch
from commands import SMALL_RUNS
from conftest import assert_rejected
from torch.utils.data import Dataset, _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from rubiks.data import limits
from rubiks.data.batches import Loader, PinnedCollate, collate
from rubiks.data.limits import NoRoom, Space, WorkerCollate, start_worker
from rubiks.errors import InputError

FULL = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_network"),
    SMALL_RUNS,
]


@pytest.fixture(autouse=True)
def _soon_noticed(monkeypatch):
    """PyTorch checks every five seconds whether the workers that it waits for are alive."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


class Samples(Dataset):
    """Sixty samples; a worker that is asked for the one numbered `fatal` calls `act`."""

    def __init__(self, fatal: int = -1, act=None) -> None:
        self.fatal, self.act = fatal, act

    def __len__(self) -> int:
        return 60

    def __getitem__(self, number: int) -> dict:
        if number == self.fatal:
            self.act()
        return {
            "views": torch.full((1, 2, 3, 64, 64), number, dtype=torch.uint8),
            "label": [number],
            "index": number,
            "reader": "none",
        }


def make_loader(data: Dataset, collate_fn=collate, workers: int = 2) -> Loader:
    return Loader(
        data,
        batch_size=3,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=2,
        collate_fn=WorkerCollate(collate_fn),
        worker_init_fn=start_worker,
    )


def end_by(number: int):
    return lambda: os.kill(os.getpid(), number)


def segmentation_fault() -> None:
    ctypes.string_at(1)


@pytest.mark.parametrize(
    ("act", "parts"),
    [
        (end_by(signal.SIGKILL), ("killed from outside (SIGKILL)", "lack of memory", "GiB", "data.workers=N")),
        (end_by(signal.SIGTERM), ("killed from outside (SIGTERM)",)),
        (segmentation_fault, ("crashed (SIGSEGV)", "rubiks check", "data.reader=")),
        (end_by(signal.SIGBUS), ("bus error", "/dev/shm has 64.0 MiB, 0.2 MiB of it free", "--shm-size=8g")),
    ],
)
@pytest.mark.parametrize("fatal", [0, 40])
def test_a_signal_that_ends_a_worker_is_one_message(monkeypatch, capfd, act, parts, fatal):
    monkeypatch.setattr(limits, "space", lambda: Space(2**26, 2**18))
    loader = make_loader(Samples(fatal, act))
    assert_rejected(lambda: list(loader), *parts)
    assert capfd.readouterr().err == ""


def test_a_defect_in_a_worker_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match=r"(?s)in DataLoader worker process.*Traceback.*__getitem__"):
        list(make_loader(Samples(5, lambda: 1 / 0)))


TO_ALL = pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])


@TO_ALL
def test_ctrl_c_while_workers_start_is_not_theirs(sent, capfd):
    """A terminal or Slurm sends it to all of them, including one that has just been forked."""

    def interrupted(number: int) -> None:
        os.kill(os.getpid(), sent)
        start_worker(number)

    loader = make_loader(Samples())
    loader.worker_init_fn = interrupted
    assert len(list(loader)) == 20
    assert capfd.readouterr().err == ""
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # and here a second one arrives


def test_the_end_of_a_worker_is_told_where_a_batch_is_waited_for():
    """Not within an optimiser step, nor while a checkpoint is written."""
    loader = make_loader(Samples())
    steps = iter(loader)
    next(steps)
    victim = loader._iterator._workers[0]
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()  # after which SIGCHLD arrived
    assert victim.exitcode == -signal.SIGKILL
    assert_rejected(lambda: next(steps), f"loader process (id {victim.pid}) was killed")


@TO_ALL
def test_ctrl_c_leaves_the_workers_to_their_parent(sent):
    """A terminal or Slurm sends it to all; the parent may finish a validation first."""
    loader = make_loader(Samples())
    numbers = []
    for batch in loader:
        numbers += batch["index"].tolist()
        for worker in loader._iterator._workers if len(numbers) > 3 else ():  # by then both have started
            os.kill(worker.pid, sent)
    assert numbers == list(range(60))


@pytest.mark.parametrize("collate_fn", [collate, PinnedCollate(2)])
def test_a_workers_batch_lies_in_shared_memory_altogether(collate_fn):
    samples = [Samples()[number] for number in range(3)]
    batch = WorkerCollate(collate_fn)(samples)
    assert all(batch[name].is_shared() for name in ("views", "label", "index"))
    assert torch.equal(batch["views"], torch.stack([sample["views"] for sample in samples]))


@pytest.mark.parametrize(("text", "caught"), [(FULL, True), ("unable to mmap 9 bytes: ... (12)", True), ("no", False)])
def test_a_worker_that_finds_no_room_says_so_in_place_of_a_batch(text, caught):
    def fail(samples):
        raise RuntimeError(text)

    samples = [Samples()[number] for number in range(3)]
    if not caught:
        with pytest.raises(RuntimeError):
            WorkerCollate(fail)(samples)
        return
    found = WorkerCollate(fail)(samples)
    assert isinstance(found, NoRoom)
    assert found.size == 3 * 2 * 3 * 64 * 64


def test_memory_is_that_of_a_container():
    assert 0 < limits.memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- with a /dev/shm of a few pages


def with_small_shm(size: int, folder: Path, function) -> None:
    """What the process of `small_shm` runs."""
    torch.set_num_threads(1)  # a forked process does not have the other threads
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = open(folder / name, "w")  # noqa: SIM115  to the end of the process
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        sys.exit("unshare is not permitted")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
    function()


@pytest.fixture
def small_shm(tmp_path_factory):
    """Calls a function in a separate process with a /dev/shm of this many bytes; returns status, stdout and stderr."""

    def run(size: int, function) -> tuple[int, str, str]:
        folder = tmp_path_factory.mktemp("output")
        process = multiprocessing.get_context("fork").Process(target=with_small_shm, args=(size, folder, function))
        process.start()
        process.join(120)
        assert process.exitcode is not None, process.kill()
        return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()

    status, _, stderr = run(4096, lambda: None)
    if status:
        pytest.skip(f"a /dev/shm of one's own is not permitted here: {stderr}")
    return run


# The views of a batch take 49 pages, label and index one each; semaphores take eleven.
def never_room_enough() -> None:
    class Large(Samples):
        def __getitem__(self, number: int) -> dict:
            return {**super().__getitem__(number), "views": torch.zeros(1, 1, 3, 150, 148, dtype=torch.uint8)}

    for pages in (20, *range(59, 64), *range(110, 115)):
        subprocess.run(["mount", "-o", f"remount,size={4096 * pages}", "/dev/shm"], check=True)
        for collate_fn in (collate, PinnedCollate(2)):
            with pytest.raises(InputError, match=r"^shared memory is full \(.*\): /dev/shm has 0\..*up to 3 batches"):
                list(make_loader(Large(), collate_fn, workers=1))
    print("done")


def test_shared_memory_of_any_size_that_does_not_suffice_is_one_message(small_shm):
    """Too small for views, or for one of the small tensors: it never waits forever."""
    assert small_shm(4096, never_room_enough) == (0, "done\n", "")


SMALL = ("device=cpu", "data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4")


def one_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "number of training batches" not in line and line[:2] != "  "]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]


def test_train_and_eval_tell_of_full_shared_memory(small_shm, builtin_data, commands):
    commands.train(*SMALL[1:], builtin_data, "recipe.epochs=1", "run=first")

    def run(name, size, *choices):
        words = (*SMALL, builtin_data, "data.workers=2", *choices)
        status, _, stderr = small_shm(size, lambda: commands.start(name, words))
        assert status == 2, stderr
        return one_error(stderr)

    # A batch has 8 * 4 * 3 * 32 * 32 bytes, 96 KiB.
    told = run("train", 120 * 1024, "recipe.batch_size=8", "logger=csv", "run=second")
    for part in ("/dev/shm has 0.1 MiB", "a batch takes 0.1 MiB", "up to 6 batches", "--ipc=host", "--shm-size=8g"):
        assert part in told
    told = run("eval", 100 * 1024, "batch_size=8", "ckpt=outputs/first")
    assert "shared memory is full" in told


def test_a_worker_killed_in_training_ends_it_at_once(builtin_data, tmp_path):
    choices = [*SMALL, builtin_data, "data.workers=2", "recipe.batch_size=8", "recipe.epochs=1000"]
    process = forked.start(tmp_path, "train", *choices, "run=killed")
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        next(line for line in process.stdout if line.startswith("epoch 1/"))
        workers = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        workers = [worker for worker in workers if Path(f"/proc/{worker}/cmdline").read_bytes() == command]
        assert len(workers) == 4  # two that train, two that validate
        os.kill(workers[0], signal.SIGKILL)
        _, stderr = process.communicate(timeout=20)
    finally:
        guard.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 2, stderr
    assert f"a loader process (id {workers[0]}) was killed from outside (SIGKILL)" in one_error(stderr)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert (tmp_path / "outputs" / "killed" / "checkpoints" / "last.ckpt").is_file()
