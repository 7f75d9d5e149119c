"""Where the training curves go: CSV, Weights & Biases (W&B), TensorBoard."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from rubiks.errors import InputError
from rubiks.runs import Run
from rubiks.settings import AsTuple, Expected, Settings

log = logging.getLogger(__name__)

PATIENCE = 5  # seconds for W&B's server to answer before training starts

# The values of WANDB_MODE, and the W&B mode each one means. In mode shared, several programs write to one run.
WANDB_MODES = {
    "online": "online",
    "run": "online",
    "shared": "shared",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


Word = Annotated[str, Expected("a name", "quote a number: '\"5\"'")]


class WandbSettings(Settings, section="logger.wandb"):
    """Weights & Biases."""

    project: Word = Field("rubiks", description="the project for the runs")
    entity: Word | None = Field(None, description="user or team; null: the default one")
    tags: Annotated[tuple[str, ...], AsTuple, Expected("a list of words, as in logger.wandb.tags=[a,b]")] = Field(
        (), description="tags of the run"
    )
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="auto: WANDB_MODE if it is set, else online if a user is logged in and the server answers, "
        "else offline; online: an error without a server",
    )


class EvaluationWandbSettings(WandbSettings):
    """Weights & Biases, for an evaluation: off unless asked for."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "disabled", description=str(WandbSettings.model_fields["mode"].description)
    )


class EvaluationLoggerSettings(Settings, section="logger"):
    """Where the results of an evaluation go, besides its folder."""

    wandb: Annotated[EvaluationWandbSettings | None, Expected("null or a section with project, entity, tags, mode")] = (
        Field(EvaluationWandbSettings(), description="Weights & Biases; null: off")
    )


class LoggerSettings(Settings, section="logger"):
    """Where the training curves go: any of these, or several together."""

    csv: bool = Field(True, description="csv/version_0/metrics.csv in the run's folder")
    wandb: WandbSettings | None = Field(WandbSettings(), description="Weights & Biases; null: off")
    tensorboard: bool = Field(
        False,
        description="for `tensorboard --logdir outputs` (pip install tensorboard); csv, wandb and this can be on "
        "together",
    )


def loggers(settings: LoggerSettings, run: Run, config: dict[str, Any], leader: bool) -> list[Logger]:
    """The loggers of a training. The W&B run begins here, in the leading process only.

    Raises:
        InputError: a package is missing, or W&B must be online and cannot be. The run's folder is then left as it was,
            unless the W&B server refused the run after it had accepted the key.
    """
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("logger.tensorboard=true needs tensorboard, which is not installed: pip install tensorboard")
    options = settings.wandb

    chosen: list[Logger] = []
    if options is not None and options.mode != "disabled":
        experiment = _begin(options, run, config) if leader else None
        if experiment is not None or not leader:
            chosen.append(WandbLogger(run.folder.name, run.folder, experiment=experiment))
    if settings.tensorboard:
        # One folder for all parts of a resumed run, so that they make one curve.
        chosen.insert(0, TensorBoardLogger(run.folder, "tensorboard", version="", default_hp_metric=False))
    if settings.csv:
        chosen.insert(0, CSVLogger(run.folder, "csv"))
    return chosen


@contextmanager
def evaluation(settings: EvaluationLoggerSettings, run: Run, config: dict[str, Any], leader: bool) -> Iterator[Any]:
    """The W&B run of an evaluation, or of the training in whose folder it is; None if W&B is off.

    Args:
        settings: whether, and where to.
        run: the folder of the evaluation.
        config: of the evaluation; the run of a training keeps its own.
        leader: whether this is the leading process; W&B is off in the others.

    Raises:
        InputError: W&B must be online and cannot be.
    """
    options = settings.wandb
    if not leader or options is None or options.mode == "disabled":
        yield None
        return
    experiment = _begin(options, run, {} if run.config.is_file() else config)
    try:
        yield experiment
    except BaseException:
        end(run, exit_code=1)
        raise
    end(run, what="the results")


def log_evaluation(experiment: Any, run: Run, protocol: str, scores: dict[str, float], files: Iterable[Path]) -> None:
    """Write an evaluation's scores to the W&B run's summary as eval/PROTOCOL/NAME, and its files as an artifact."""
    import wandb

    experiment.summary.update({f"eval/{protocol}/{name}": value for name, value in scores.items()})
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", f"evaluation-{run.folder.name}-{protocol}"), "evaluation")
    for path in files:
        artifact.add_file(str(path))
    experiment.log_artifact(artifact)


def end(run: Run, exit_code: int = 0, what: str = "the curves") -> None:
    """End the W&B run, if there is one, and say how to upload what it has kept offline; `what` names it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code)
    command = sync_command(run)
    if command is not None:
        print(f"To upload {what} to W&B: {command}")


def sync_command(run: Run) -> str | None:
    """The command that uploads all parts of the run that W&B has kept offline; None if there are none."""
    folder = run.folder / "wandb"
    parts = folder.glob("offline-run-*/*.wandb")
    waiting = [part for part in parts if not part.with_name(f"{part.name}.synced").exists()]
    # Given a folder, `wandb sync` uploads every part that it has not uploaded yet, in the order in which they began.
    return f"wandb sync {shlex.quote(str(folder))}" if waiting else None


def _mode(wanted: str) -> tuple[str, str]:
    """The W&B mode, and the setting that requires it; empty if none does, so that W&B may also be offline."""
    variable = os.environ.get("WANDB_MODE")
    if variable == "":
        del os.environ["WANDB_MODE"]  # W&B would refuse it
    elif variable is not None and variable not in WANDB_MODES:
        raise InputError(
            f"the environment variable WANDB_MODE must be one of {', '.join(WANDB_MODES)}; got {variable!r}. Unset it "
            "to leave the choice to logger.wandb.mode"
        )
    import wandb  # slow to import

    try:
        # W&B prints warnings and errors, but no banners, and still captures the screen output for the run's page.
        settings = wandb.setup(wandb.Settings(show_info=False)).settings
    except ValueError as error:
        raise InputError(
            f"an environment variable WANDB_... or W&B's settings file is wrong: {' '.join(str(error).split())}"
        ) from None
    if wanted != "auto":
        return wanted, f"logger.wandb.mode={wanted}"
    if variable:
        return WANDB_MODES[variable], f"WANDB_MODE={variable}"
    left = WANDB_MODES[settings.mode]
    if left == "offline":
        log.info("W&B: offline, because `wandb offline` was run; `wandb online` undoes it")
    return left, ""


def _obstacle(mode: Any) -> str:
    """Why W&B cannot be online, found out within seconds; empty if it can."""
    import wandb

    settings = wandb.setup(wandb.Settings(mode=mode)).settings  # WANDB_MODE=offline would forbid the check
    begun = time.monotonic()
    try:
        with _patience():
            return "" if wandb.login(prompt=False) else "nobody is logged in (`wandb login`, or WANDB_API_KEY)"
    except wandb.errors.Error as error:
        late = time.monotonic() - begun >= PATIENCE
        return f"{settings.base_url} does not answer" if late else str(error)


@contextmanager
def _patience() -> Iterator[None]:
    """Let W&B wait for its server for PATIENCE seconds, unless the user has set how long."""
    name = "WANDB_HTTP_TIMEOUT"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(PATIENCE)
    try:
        yield
    finally:
        del os.environ[name]


def _begin(options: WandbSettings, run: Run, config: dict[str, Any]) -> Any:
    """Begin or resume a W&B run, offline if it cannot be online and need not be; None if W&B is disabled."""
    mode, insists = _mode(options.mode)
    if mode == "disabled":
        return None
    import wandb

    problem = "" if mode == "offline" else _obstacle(mode)
    try:
        experiment = None if problem else _init(options, run, config, mode)
    except wandb.errors.Error as error:
        problem, experiment = str(error), None
    if experiment is None:
        problem = " ".join(problem.split())
        if insists:
            raise InputError(
                f"{insists}, but {problem}. To train without W&B's server, choose logger.wandb.mode=offline"
            )
        log.warning("W&B: offline, because %s", problem)
        experiment = _init(options, run, config, "offline")
    elif mode != "offline":
        log.info("W&B: %s", experiment.url)
    # As in Lightning's logger: curves over training steps.
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return experiment


def _init(options: WandbSettings, run: Run, config: dict[str, Any], mode: Any) -> Any:
    import wandb

    # The id is kept in the run's folder, so that a resumed run is one run in W&B too. A sweep's agent sets one.
    id_file = run.folder / "wandb-id"
    run_id = os.environ.get("WANDB_RUN_ID") or (id_file.read_text().strip() if id_file.is_file() else "")
    run_id = run_id or secrets.token_hex(4)
    id_file.write_text(run_id)
    where: dict[str, Any] = {"project": options.project, "entity": options.entity, "id": run_id}
    if os.environ.get("WANDB_SWEEP_ID"):
        where = {}  # W&B gets these from the agent, and would warn that it ignores ours
    return wandb.init(
        **where,
        name=run.folder.name,
        tags=options.tags,
        dir=run.folder,
        mode=mode,
        resume="allow",  # offline too: `wandb sync` then appends a later part to the earlier ones
        reinit="finish_previous",  # runs of --multirun
        config=config,
    )
