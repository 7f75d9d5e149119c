"""Checks before a training of several processes."""

from __future__ import annotations

import dataclasses
import re
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from forked import end, start

from rubiks import preflight, processes
from rubiks.board import Board
from rubiks.data.records import VideoRecord
from rubiks.errors import InputError
from rubiks.preflight import Facts, notes, problems
from rubiks.rendezvous import Place

SAME = {"version of PyTorch": "2.14", "training list": "24 videos, abc"}


def cluster(*changes: dict) -> list[Facts]:
    """Four processes on two hosts, with these facts of each changed."""
    usual = [
        Facts(rank, ("left", "right")[rank // 2], "eth0", f"10.0.0.{rank // 2}", "H200", f"GPU-{rank}", SAME, [])
        for rank in range(4)
    ]
    return [dataclasses.replace(own, **change) for own, change in zip(usual, changes or [{}] * 4, strict=True)]


CASES = {
    "nothing": (cluster(), []),
    "on CPUs": (cluster(*[{"gpu": "", "device": "cpu"}] * 4), []),
    "equal ids on two hosts": (cluster({"gpu": "a"}, {"gpu": "b"}, {"gpu": "a"}, {"gpu": "b"}), []),
    "one GPU": (
        cluster({"gpu": "a"}, {"gpu": "a"}, {}, {}),
        ["processes 0, 1 on left would share one GPU (H200, a): start one process for each GPU, and let each see all "
         "GPUs of its host (CUDA_VISIBLE_DEVICES)"],
    ),
    "other version": (
        cluster({}, {}, {}, {"equal": SAME | {"version of PyTorch": "2.13"}}),
        ["version of PyTorch differs: 2.14 in processes 0, 1 on left, process 2 on right; 2.13 in process 3 on right"],
    ),
    "other list": (
        cluster({}, {}, *[{"equal": SAME | {"training list": "20 videos, def"}}] * 2),
        ["training list differs: 24 videos, abc in processes 0, 1 on left; 20 videos, def in processes 2, 3 on right"],
    ),
    "only on one host": (
        cluster(*[{"equal": SAME | {"version of NCCL": "2.29"}}] * 2, {}, {}),
        ["version of NCCL differs: 2.29 in processes 0, 1 on left; missing in processes 2, 3 on right"],
    ),
    "faults": (
        cluster({"faults": ["no room"]}, {}, {}, {"faults": ["cannot read", "another"]}),
        ["process 0 on left: no room", "process 3 on right: cannot read", "process 3 on right: another"],
    ),
    "folder of its own": (cluster({}, {}, *[{"sees_folder": False}] * 2), []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_problems(name):
    facts, expected = CASES[name]
    assert problems(facts) == expected


def test_a_folder_of_its_own_is_noted():
    assert notes(CASES["nothing"][0]) == []
    (note,) = notes(CASES["folder of its own"][0])
    assert note.startswith("processes 2, 3 on right cannot see the run's folder of process 0 on left: the run trains,")


def test_versions_name_what_must_be_equal():
    found = preflight.versions()
    assert found["version of PyTorch"] == torch.__version__
    assert {"version of rubiks", "version of Python", "build of the operators"} <= found.keys()


def test_the_interface_to_this_host_is_loopback():
    assert preflight.network(Place(0, 2, 0, "127.0.0.1", 29500)) == ("lo", "127.0.0.1")


def test_unreadable_videos(tmp_path):
    (tmp_path / "good").write_text("x")
    good, bad = (VideoRecord(str(tmp_path / name), 0) for name in ("good", "bad"))
    assert preflight.unreadable("training", [good, bad, good]) == []  # only the ends are opened
    (fault,) = preflight.unreadable("training", [good, bad])
    assert fault.startswith("a video of the training list cannot be read: ")
    assert str(tmp_path / "bad") in fault


def test_room(tmp_path):
    assert preflight.no_room(tmp_path, 1) == []
    (fault,) = preflight.no_room(tmp_path, 10**18)
    assert re.fullmatch(rf"{tmp_path} has \S+ GB of free space, but the run's checkpoints need 1000000000.0 GB", fault)


def test_facts_of_all_are_exchanged_and_nothing_stays_in_the_folder(tmp_path):
    store = dist.HashStore()
    found: dict[int, list[Facts]] = {}

    def run(rank: int) -> None:
        member = SimpleNamespace(place=Place(rank, 2, 0, "127.0.0.1", 1), board=Board(store, 2), timeout=10.0)
        folder = tmp_path if rank == 0 else None
        equal, faults = {"list": str(rank)}, [f"fault of {rank}"]
        found[rank] = preflight.exchange(member, torch.device("cpu"), equal, faults, folder)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert [(own.rank, own.faults, own.sees_folder) for own in found[0]] == [
        (0, ["fault of 0"], True),
        (1, ["fault of 1"], True),
    ]
    assert "list differs: 0 in process 0" in problems(found[0])[-1]
    assert list(tmp_path.iterdir()) == []


# ---- connecting


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_first_process_that_cannot_be_reached(port):
    place = Place(3, 8, 1, "127.0.0.1", port)
    with pytest.raises(InputError, match="firewall") as caught:
        processes.join(place, 0.3, 10)
    assert f"process 3 of 8 on {socket.gethostname()} cannot reach 127.0.0.1:{port} within 0.3 s (connect_tim" in str(
        caught.value
    )
    assert "Connection refused" in str(caught.value)
    assert processes.member() is None


def test_an_address_without_a_host(port):
    with pytest.raises(InputError, match=r"cannot reach no\.such\.host\.invalid"):
        processes.join(Place(1, 2, 0, "no.such.host.invalid", port), 0.1, 10)


def test_a_port_in_use(port):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(InputError, match=f"cannot open 127.0.0.1:{port}"):
            processes.join(Place(0, 2, 0, "127.0.0.1", port), 0.3, 10)


def test_processes_that_do_not_come_are_named(port):
    try:
        with pytest.raises(InputError, match=f"1 of 3 processes have connected to 127.0.0.1:{port} on .*: 1, 2"):
            processes.join(Place(0, 3, 0, "127.0.0.1", port), 0.3, 60)
    finally:
        processes.member()._stopped.set()
        processes._member = None


# ---- the command and the training


def refuse() -> None:
    raise RuntimeError("Gloo connectFullMesh failed\nand a long trace")


def test_an_all_reduce_without_an_answer():
    waits = threading.Event()
    strategy = SimpleNamespace(setup_environment=lambda: waits.wait() and refuse())
    with pytest.raises(InputError) as caught:
        preflight.connect(SimpleNamespace(strategy=strategy), Place(1, 2, 0, "127.0.0.1", 29500), 0.2)
    waits.set()
    here = f"process 1 of 2 on {socket.gethostname()} (lo, 127.0.0.1"
    for words in (here, "got no answer within 0.2 s", "NCCL_SOCKET_IFNAME"):
        assert words in str(caught.value)


def test_an_all_reduce_that_fails():
    strategy = SimpleNamespace(setup_environment=refuse)
    with pytest.raises(InputError, match=r"with the others failed: Gloo connectFullMesh failed\. Set NCCL"):
        preflight.connect(SimpleNamespace(strategy=strategy), Place(1, 2, 0, "127.0.0.1", 29500), 10)


CHOICES = ("data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4", "trainer=ddp")


def test_one_process_has_nothing_to_check(builtin_data, commands):
    assert "there is only one process: choose trainer=ddp" in commands.refused("check-cluster", builtin_data, *CHOICES)


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_check_cluster_starts_processes_and_describes_them(builtin_data, tmp_path):
    process = start(tmp_path, "check-cluster", builtin_data, *CHOICES, "trainer.devices=2")
    status, out, err = end(process)
    assert (status, err) == (0, "")
    header, *rows, verdict = out.splitlines()
    assert header.split() == ["process", "host", "device", "interface", "all-reduce", "of", "64", "MB"]
    host = re.escape(socket.gethostname())
    for rank, row in enumerate(rows):
        assert re.fullmatch(rf"{rank} +{host} +cpu +lo 127.0.0.1 +[\d.]+ ms +[\d.]+ GB/s", row)
    assert verdict == "2 processes on 1 host can train together"
    assert list(tmp_path.rglob("*")) == []


@pytest.fixture
def hosts(builtin_data, port, tmp_path):
    """Runs a command on two hosts, each in its folder and with its choices: status, stdout and stderr of each."""

    def run(name: str, *own: tuple[Path, str]) -> list[tuple[int, str, str]]:
        shared = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        several = (builtin_data, *CHOICES, "trainer.devices=1", "trainer.num_nodes=2", "run=both")
        started = []
        for rank, (folder, choice) in enumerate(own):
            here = {"RANK": str(rank), "GROUP_RANK": str(rank), "HOST": f"host-{rank}"}
            started.append(start(folder, name, *several, choice, **shared, **here))
        return [end(process, timeout=60) for process in started]

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(("name", "status"), [("check-cluster", 1), ("train", 2)])
def test_hosts_with_other_choices(name, status, hosts, tmp_path):
    (status_0, out, err), other = hosts(name, (tmp_path, "seed=0"), (tmp_path, "seed=1"))
    assert (status_0, *other) == (status, status, "", "")
    problem = "- seed differs: 0 in process 0 on host-0; 1 in process 1 on host-1"
    if name == "train":
        assert err == f"error: 2 processes cannot train together:\n{problem}\n"
    else:
        assert out.splitlines()[-2:] == ["2 processes on 2 hosts cannot train together:", problem]
    assert list(tmp_path.glob("outputs/*")) == []


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_a_run_that_only_one_host_has(builtin_data, hosts, tmp_path):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    choices = (builtin_data, *CHOICES, "run=both", "recipe.batch_size=4", "trainer.max_steps=2")
    status, _, err = end(start(tmp_path / "0", "train", *choices))
    assert status == 0, err
    first, _ = hosts("train", *((tmp_path / name, "recipe.batch_size=2") for name in ("0", "1")))
    assert first[0] == 2
    assert first[2].splitlines()[-1] == (
        "- start of training differs: 0 epochs and 8 videos of the next (2 steps) in process 0 on host-0; "
        "0 epochs (0 steps) in process 1 on host-1"
    )
