"""Logging of curves: Weights & Biases with and without a server, offline parts, sweeps, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from commands import BASE, SMALL_RUNS
from conftest import ROOT, assert_rejected

from rubiks import RubiksNet, tracking
from rubiks.cli.entry import training
from rubiks.data import builtin
from rubiks.runs import Run

wandb = pytest.importorskip("wandb")

SMALL = ("data.train_videos=16", "data.val_videos=8", "data.size=32", "data.num_frames=4")
QUICK = ("recipe.batch_size=8", "recipe.epochs=1", "trainer.log_every_n_steps=1")
KEY = 40 * "a"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_network"), SMALL_RUNS]


class Server(ThreadingHTTPServer):
    """The parts of W&B's server that a run and `wandb sync` need."""

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests = 0
        self.runs: dict[str, list[str]] = {}  # the lines of each run's history
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, operation: str, values: dict) -> dict:
        project = {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "me"}}
        name = values.get("name")
        if operation == "Viewer":
            viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "email": "", "teams": {"edges": []}}
            return {"viewer": viewer}
        if operation == "RunResumeStatus":
            lines = self.runs.get(name)
            if not lines:
                return {"model": {**project, "bucket": None}}
            counts = {f"{kind}LineCount": 0 for kind in ("log", "events")}
            tails = {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "summaryMetrics": lines[-1]}
            texts = {"displayName": name, "config": "{}", "wandbConfig": '{"t": 1}', "tags": [], "notes": ""}
            bucket = {"id": "aWQ=", "name": name, "historyLineCount": len(lines), **counts, **tails, **texts}
            return {"model": {**project, "bucket": bucket}}
        if operation == "UpsertBucket":
            new = name not in self.runs
            self.runs.setdefault(name, [])
            texts = {"displayName": name, "description": "", "config": "{}", "sweepName": None}
            bucket = {"id": "aWQ=", "name": name, "historyLineCount": len(self.runs[name]), "project": project}
            return {"upsertBucket": {"bucket": {**bucket, **texts}, "inserted": new}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload"} for file in values["files"]]
            return {"createRunFiles": {"runID": "aWQ=", "uploadHeaders": [], "files": files}}
        return {}

    def history(self) -> list[dict]:
        (lines,) = self.runs.values()
        return list(map(json.loads, lines))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # by W&B's service, when it ends
            super().handle()

    def do_POST(self) -> None:
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content: dict = {}
        if self.path.endswith("/file_stream"):
            chunk = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if chunk is not None:
                self.server.runs[self.path.split("/")[-2]][chunk["offset"] :] = chunk["content"]
            content = {"exitcode": None, "limits": {}}
        elif self.server.status != 200:
            content = {"errors": [{"message": "user is not logged in"}]}
        elif self.path.endswith("/graphql"):
            request = json.loads(body)
            content = {"data": self.server.answer(request["operationName"], request.get("variables") or {})}
        text = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST  # noqa: N815


@pytest.fixture
def server():
    with Server() as server:
        yield server
        wandb.finish()  # while there is a server
        server.shutdown()


@pytest.fixture
def wrong_key_server():
    with Server(401) as server:
        yield server
        server.shutdown()


@pytest.fixture
def closed_port():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.fixture
def silent_port():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are only accepted
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The fastest setting for such small tensors, especially on shared cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def setting(monkeypatch, tmp_path):
    """No user settings or keys, and a fresh W&B in each test. Returns a function that sets an environment variable."""
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "artifacts"))
    monkeypatch.setattr(tracking, "PATIENCE", 1)
    wandb.teardown()
    yield monkeypatch.setenv
    wandb.finish()
    wandb.teardown()


@pytest.fixture(scope="module")
def builtin_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("builtin")
    builtin.generate(root, "plain", 16, 8, 0, progress=False)
    return f"data.root={root}"


@pytest.fixture
def begin(tmp_path, caplog):
    """Starts a run's logging like train.py; returns the kind of W&B's folder, or None, and the messages about W&B."""
    caplog.set_level("INFO")
    run = Run(tmp_path / "run")
    run.folder.mkdir()

    def begin(*choices: str, leader: bool = True) -> tuple[str | None, list[str]]:
        tracking.loggers(training(list(choices)).logger, run, {}, leader)
        folders = [path.name.partition("run-")[0] + "run" for path in run.folder.glob("wandb/*run-*-*")]
        assert len(folders) <= 1
        return (folders or [None])[0], [text for text in caplog.messages if text.startswith("W&B")]

    return begin


# ---- online or offline


@pytest.mark.parametrize(
    ("key", "place", "reason"),
    [
        ("", "server", "nobody is logged in"),
        ("abc", "server", "API key must have 40+ characters"),
        (KEY, "wrong_key_server", "user is not logged in"),
        (KEY, "closed_port", "does not answer"),
        (KEY, "silent_port", "does not answer"),
    ],
)
def test_without_a_server_or_key_wandb_is_offline_unless_it_must_be_online(
    key, place, reason, setting, begin, request, tmp_path
):
    place = request.getfixturevalue(place)
    setting("WANDB_BASE_URL", getattr(place, "url", place))
    setting("WANDB_API_KEY", key)
    started = time.monotonic()
    assert_rejected(lambda: begin("logger.wandb.mode=online"), "logger.wandb.mode=online, but ", reason, "=offline")
    assert list((tmp_path / "run").iterdir()) == []
    kind, said = begin()
    assert time.monotonic() - started < 12
    assert kind == "offline-run"
    (line,) = said
    assert line.startswith("W&B: offline, because ")
    assert reason in line


def test_a_key_and_a_server_are_enough_to_be_online(server, setting, begin, tmp_path):
    setting("WANDB_BASE_URL", server.url)
    setting("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine {server.url.rpartition('/')[2]} login user password {KEY}\n")
    kind, said = begin()
    assert kind == "run"
    (name,) = server.runs
    assert said == [f"W&B: {server.url}/me/p/runs/{name}"]


def test_a_refused_mode_leaves_no_run_behind(wrong_key_server, setting, builtin_data, commands):
    setting("WANDB_BASE_URL", wrong_key_server.url)
    setting("WANDB_API_KEY", KEY)
    message = commands.refused("train", builtin_data, *SMALL, *QUICK, "logger.wandb.mode=online")
    assert "user is not logged in" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "kind", "lines"),
    [("", "offline-run", 1), ("offline", "offline-run", 0), ("dryrun", "offline-run", 0), ("disabled", None, 0)],
)
def test_modes_of_the_environment(mode, kind, lines, server, setting, begin):
    setting("WANDB_BASE_URL", server.url)
    setting("WANDB_MODE", mode)
    actual, said = begin()
    assert (actual, len(said), server.requests) == (kind, lines, 0)


@pytest.mark.parametrize("mode", ["online", "run", "shared"])
def test_modes_of_the_environment_that_need_a_server(mode, server, setting, begin):
    setting("WANDB_BASE_URL", server.url)
    setting("WANDB_API_KEY", KEY)
    setting("WANDB_MODE", mode)
    assert begin()[0] == "run"
    assert len(server.runs) == 1


def test_the_configuration_overrides_the_environment(server, setting, begin):
    setting("WANDB_BASE_URL", server.url)
    setting("WANDB_API_KEY", KEY)
    setting("WANDB_MODE", "offline")
    assert begin("logger.wandb.mode=online")[0] == "run"


def test_wandb_offline_is_respected(server, setting, begin, tmp_path):
    setting("WANDB_BASE_URL", server.url)
    setting("WANDB_API_KEY", KEY)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings/settings").write_text("[default]\nmode = offline\n")
    kind, (line,) = begin()
    assert kind == "offline-run"
    assert "`wandb online` undoes it" in line
    assert server.requests == 0


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("WANDB_MODE", "of", ("WANDB_MODE", "'of'", "online, run, shared, offline, dryrun, disabled")),
        ("WANDB_MODE", "online", ("WANDB_MODE=online, but ", "nobody is logged in")),
        ("WANDB_MODE", "shared", ("WANDB_MODE=shared, but ", "nobody is logged in")),
        ("WANDB_RESUME", "perhaps", ("WANDB_", "resume", "perhaps")),
    ],
)
def test_wrong_settings_of_the_environment(name, value, parts, setting, begin):
    setting(name, value)
    assert_rejected(begin, *parts)


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        (["logger.wandb=true"], ("logger.wandb", "null", "project, entity, tags, mode", "True")),
        (["logger=csv", "+logger.wandb.modus=offline"], ("logger.wandb.modus", "logger.wandb.mode")),
        (["logger.wandb.mode=of"], ("logger.wandb.mode", "auto, online, offline, disabled", "'of'")),
        (["logger.wandb.tags=night"], ("logger.wandb.tags", "list", "'night'")),
        (["logger.wandb.project=5"], ("logger.wandb.project", "5")),
        (["logger.tensorboard=1"], ("logger.tensorboard", "true or false", "1")),
        (["logger.csv=null"], ("logger.csv", "true or false", "None")),
    ],
)
def test_wrong_choices_of_loggers(choices, parts, begin):
    assert_rejected(lambda: begin(*choices), *parts)


@pytest.mark.parametrize(
    ("choices", "kinds"),
    [
        (["logger=csv"], ["CSVLogger"]),
        (["logger=csv", "logger.wandb.mode=offline"], ["CSVLogger", "WandbLogger"]),
        (["logger=csv", "logger.tensorboard=true"], ["CSVLogger", "TensorBoardLogger"]),
        (["logger=default", "logger.wandb=null", "logger.csv=false"], []),
        (["logger=tensorboard", "logger.wandb={mode: offline, tags: [a]}"], None),
        (["logger.tensorboard=true", "logger.wandb.mode=offline"], None),  # with the default ones
    ],
)
def test_loggers_can_be_combined(choices, kinds, tmp_path):
    pytest.importorskip("tensorboard")
    chosen = tracking.loggers(training(choices).logger, Run(tmp_path), {}, True)
    kinds = ["CSVLogger", "TensorBoardLogger", "WandbLogger"] if kinds is None else kinds
    assert [type(logger).__name__ for logger in chosen] == kinds


def test_only_the_leading_process_talks_to_wandb(server, setting, begin, tmp_path):
    setting("WANDB_BASE_URL", server.url)
    setting("WANDB_API_KEY", KEY)
    assert begin("logger.wandb.mode=online", leader=False) == (None, [])
    assert server.requests == 0
    assert list((tmp_path / "run").iterdir()) == []


# ---- trainings


def records(folder) -> list[dict]:
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", folder]
    lines = subprocess.run(inspect, capture_output=True, check=True).stdout.splitlines()
    return list(map(json.loads, lines))


AGENT = """
import json, sys
from wandb.wandb_agent import Agent
command, program, values = json.loads(sys.argv[1])
agent = Agent(api=None, queue=None, sweep_id="sweep1")
agent._sweep_command = command
settings = {key: {"value": value} for key, value in values.items()}
agent._command_run({"run_id": "agent1", "program": program, "args": settings})
sys.exit(agent._run_processes["agent1"].wait())
"""


@pytest.fixture(scope="module")
def swept(builtin_data, tmp_path_factory):
    """A run of the shipped sweep: its values and its output.

    W&B's own agent makes the command from the file and starts it; the server's part is imitated. Nobody is logged in.
    """
    folder = tmp_path_factory.mktemp("swept")
    sweep = yaml.safe_load((ROOT / "scripts/sweep.yaml").read_text())
    choices = sweep["parameters"]
    values = {key: choices[key]["values"][0] if "values" in choices[key] else choices[key]["min"] for key in choices}
    command = [*sweep["command"], *BASE, builtin_data, *SMALL, *QUICK]
    arguments = json.dumps([command, str(ROOT / sweep["program"]), values])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"NETRC": str(folder / "netrc"), "WANDB_CONFIG_DIR": str(folder), "WANDB_SWEEP_ID": "sweep1"}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    agent = [sys.executable, "-c", AGENT, arguments]
    done = subprocess.run(agent, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "outputs/sweep-agent1", values, done


def test_the_screen_shows_two_lines_about_wandb(swept):
    """In separate processes, since W&B's service also writes past Python."""
    _, _, done = swept
    assert [line for line in done.stdout.splitlines() if re.search("wandb|W&B", line)] == [
        "W&B: offline, because nobody is logged in (`wandb login`, or WANDB_API_KEY)",
        "To upload the curves to W&B: wandb sync outputs/sweep-agent1/wandb",
    ]
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_wandb_keeps_the_curves_offline(swept):
    (folder,) = swept[0].glob("wandb/offline-run-*")
    kept = records(folder)
    history = [record["history"] for record in kept if record["type"] == "history"]
    curves = json.dumps(history)
    for key in ("train/loss_step", "train/top1", "val/top1", "val/top5", "clips/s", "shifts/offsets"):
        assert key in curves
    assert len(history) > 3
    assert "epoch 1/1" in json.dumps([record for record in kept if record["type"] == "output_raw"])  # the screen


def test_the_sweep_that_is_shipped_trains_what_its_agent_chose(swept):
    run, values, _ = swept
    assert (run / "wandb-id").read_text() == "agent1"
    assert len(list(run.glob("wandb/offline-run-*-agent1"))) == 1
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: config[key.partition(".")[0]][key.partition(".")[2]] for key in values} == values
    sweep = yaml.safe_load((ROOT / "scripts/sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"}


def test_one_command_uploads_all_offline_parts_of_a_run(server, setting, builtin_data, commands, tmp_path):
    setting("WANDB_MODE", "offline")
    options = (builtin_data, *SMALL, "recipe.batch_size=8", "logger=default", "run=parts")
    commands.train(*options, "recipe.epochs=1", "trainer.log_every_n_steps=1")
    time.sleep(1)  # W&B's folders are named by the second
    output = commands.train(*options, "recipe.epochs=2", "trainer.log_every_n_steps=1")
    assert len(list(tmp_path.glob("outputs/parts/wandb/offline-run-*"))) == 2
    (line,) = [line for line in output.splitlines() if line.startswith("To upload")]
    program, *arguments = shlex.split(line.partition(": ")[2])
    assert program == "wandb"

    environment = {**os.environ, "WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    upload = [sys.executable, "-m", "wandb", *arguments]
    done = subprocess.run(upload, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    history = server.history()
    assert [row["_step"] for row in history] == list(range(len(history)))
    assert [row["trainer/global_step"] for row in history if "train/loss_step" in row] == list(range(4))
    assert {row["epoch"] for row in history if "val/top1" in row} == {0, 1}
    assert set(server.runs) == {(tmp_path / "outputs/parts/wandb-id").read_text()}
    assert tracking.sync_command(Run(tmp_path / "outputs/parts")) is None


def test_the_command_to_upload_is_quoted_for_a_shell(tmp_path):
    run = Run(tmp_path / "my run's")
    part = run.folder / "wandb/offline-run-20261130_140450-abc/run-abc.wandb"
    part.parent.mkdir(parents=True)
    assert tracking.sync_command(run) is None
    part.touch()
    command = tracking.sync_command(run)
    assert command is not None
    assert shlex.split(command) == ["wandb", "sync", str(run.folder / "wandb")]


def test_runs_of_multirun_are_runs_of_their_own(setting, builtin_data, commands, tmp_path):
    setting("WANDB_MODE", "offline")
    status, _, err = commands.run("train", (*BASE, builtin_data, *SMALL, *QUICK, "run=m", "seed=1,2", "--multirun"))
    assert status == 0, err
    ids = [(tmp_path / f"outputs/m-{number}/wandb-id").read_text() for number in (0, 1)]
    assert ids[0] != ids[1]
    for number, run_id in enumerate(ids):
        assert len(list(tmp_path.glob(f"outputs/m-{number}/wandb/offline-run-*-{run_id}/*.wandb"))) == 1


# ---- sweeps


def test_the_run_id_of_an_agent_is_kept(setting, begin, tmp_path):
    setting("WANDB_MODE", "offline")
    setting("WANDB_SWEEP_ID", "sweep1")
    setting("WANDB_RUN_ID", "agent1")
    (tmp_path / "run/wandb-id").write_text("ours")
    assert begin()[0] == "offline-run"
    assert wandb.run.id == "agent1"
    assert (tmp_path / "run/wandb-id").read_text() == "agent1"


def test_a_choice_with_hyphens_gets_a_hint(builtin_data, commands):
    message = commands.refused("train", builtin_data, "--recipe.lr=0.1")
    assert "write recipe.lr=0.1. " in message
    assert "${args_no_hyphens}" in message
    assert message.count("\n") == 1
    assert "args_no_hyphens" in commands.refused("eval", "--run=night")
    for own in (("--cfg=job",), ("--config-name=train", "--cfg", "job")):
        status, out, err = commands.run("train", own)
        assert status == 0, err
        assert "recipe:" in out


# ---- TensorBoard


def test_curves_for_tensorboard(builtin_data, commands, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = (builtin_data, *SMALL, "recipe.batch_size=8", "logger=tensorboard", "run=board")
    assert "W&B" not in commands.train(*options, "recipe.epochs=1", "trainer.log_every_n_steps=1")
    commands.train(*options, "recipe.epochs=2", "trainer.log_every_n_steps=1")
    events = EventAccumulator(str(tmp_path / "outputs/board/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/top1")] == [1, 3]
    assert [event.step for event in events.Scalars("train/loss_step")] == list(range(4))
    assert "hp_metric" not in events.Tags()["scalars"]
    values = []
    for version in (0, 1):
        with (tmp_path / f"outputs/board/csv/version_{version}/metrics.csv").open() as file:
            values += [float(row["val/top1"]) for row in csv.DictReader(file) if row["val/top1"]]
    assert [event.value for event in events.Scalars("val/top1")] == pytest.approx(values)


def test_tensorboard_that_is_not_installed(builtin_data, commands, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = commands.refused("train", builtin_data, *SMALL, *QUICK, "logger=tensorboard")
    assert "pip install tensorboard" in message


# ---- evaluations


@pytest.fixture
def network(tmp_path):
    """The choices of an evaluation of a random network."""
    RubiksNet("tiny", 8, num_frames=4).save_pretrained(tmp_path / "net.pth.tar")
    return ("ckpt=net.pth.tar", "data.size=32")


def of_type(folder, kind: str) -> list[dict]:
    return [record[kind] for record in records(folder) if record["type"] == kind]


def test_an_evaluation_does_without_wandb_unless_asked(server, setting, builtin_data, network, commands, tmp_path):
    setting("WANDB_API_KEY", KEY)
    setting("WANDB_BASE_URL", server.url)
    commands.evaluate(builtin_data, *SMALL, *network, "run=scores", "report=false")
    assert not list(tmp_path.rglob("*wandb*"))
    assert server.requests == 0


def test_wandb_keeps_scores_and_files_of_an_evaluation(setting, builtin_data, network, commands, tmp_path):
    output = commands.evaluate(
        builtin_data, *SMALL, *network, "run=a+1", "protocol=two_clip", "logger.wandb.mode=offline",
        "logger.wandb.tags=[night]",
    )  # fmt: skip
    run = tmp_path / "outputs/a+1"
    assert f"To upload the results to W&B: {tracking.sync_command(Run(run.relative_to(tmp_path)))}" in output
    (folder,) = run.glob("wandb/offline-run-*")
    numbers = json.loads((run / "results.json").read_text())
    summary = {name: value for own in of_type(folder, "summary") for name, value in own["update"].items()}
    for name in ("top1", "top5", "mean_class_accuracy", "calibration_error"):
        assert summary[f"eval/two_clip/{name}"] == numbers[name]
    (artifact,) = of_type(folder, "artifact")
    assert (artifact["type"], artifact["name"]) == ("evaluation", "evaluation-a-1-two_clip")
    sizes = {own["path"]: int(own["size"]) for own in artifact["manifest"]["contents"]}
    assert sizes == {
        name: (run / name).stat().st_size
        for name in ("confusion.csv", "per_class.csv", "predictions.csv", "report.html", "results.json")
    }
    (begun,) = of_type(folder, "run")
    assert begun["tags"] == ["night"]


def test_an_evaluation_beside_a_training_goes_to_its_run(setting, builtin_data, commands, tmp_path):
    setting("WANDB_MODE", "offline")
    commands.train(builtin_data, *SMALL, *QUICK, "logger=default", "run=both")
    before = (tmp_path / "outputs/both/wandb-id").read_text()
    time.sleep(1)  # W&B's folders are named by the second
    commands.evaluate(builtin_data, *SMALL[:2], "run=both", "logger.wandb.mode=auto", "report=false")
    assert (tmp_path / "outputs/both/wandb-id").read_text() == before
    assert len(list(tmp_path.glob(f"outputs/both/wandb/offline-run-*-{before}"))) == 2


def test_an_evaluation_that_must_be_online_is_refused_before_it_scores(
    wrong_key_server, setting, builtin_data, network, commands
):
    setting("WANDB_API_KEY", KEY)
    setting("WANDB_BASE_URL", wrong_key_server.url)
    message = commands.refused("eval", builtin_data, *SMALL, *network, "logger.wandb.mode=online")
    assert "logger.wandb.mode=online, but" in message
