"""Running a Hydra entry point, with errors that a user can act on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rubiks import launched, processes
from rubiks.choices import CommandLine, presets
from rubiks.cli.helping import print_help
from rubiks.cli.keys import check_added, check_form, explain
from rubiks.data.sources import Source
from rubiks.errors import InputError, readable
from rubiks.experiment import Evaluation, Training
from rubiks.settings import defaults
from rubiks.stopping import Interrupted

# conf/train.yaml and conf/eval.yaml start from the defaults of the settings.
for _model in (Training, Evaluation):
    _data = {key: value for part in (Source, *_model.DATA) for key, value in defaults(part).items()}
    ConfigStore.instance().store(f"{_model.NAME}_defaults", {**defaults(_model), "data": _data})

# Hydra's arguments that take a value.
_HYDRA = ("--cfg", "--config-dir", "--config-name", "--config-path", "--experimental-rerun", "--info", "--package")


def launch(job: Callable[[Any, dict[str, Any], CommandLine], None], model: type[Training | Evaluation]) -> None:
    """Compose the configuration from the command line, check it, and run the job with it.

    The job gets the settings, the configuration they were made from as plain data, and the command line. Bad input ends
    the program with one message on stderr and exit status 2. Any other error is a defect and keeps its traceback.
    """
    config_folder, config_name = presets(), model.NAME
    # Hydra would print a shortened traceback and end the process before the cause can be reported.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # The data module skips the videos that were seen before an interruption, which Lightning cannot know.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")  # patience was set before
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")  # recipe.freeze
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # 16-mixed may skip the first step
    warnings.filterwarnings("ignore", "GPU available but not used")  # device=cpu says so
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 with PyTorch 2.14 and later

    threading.excepthook = _in_thread
    _refuse_hyphens(sys.argv[1:])
    begun = False

    def run(cfg: DictConfig) -> None:
        nonlocal begun
        begun = True
        try:
            hydra_config = HydraConfig.get()
            command = CommandLine(
                list(hydra_config.overrides.task),
                hydra_config.job.num if hydra_config.mode == RunMode.MULTIRUN else None,
            )
            check_added(cfg, config_name, command.choices)
            config = plain(cfg)
            settings = model(**config)
            processes.join(launched.place(*settings.processes), settings.connect_timeout, settings.process_timeout)
            job(settings, config, command)
            processes.leave()
        except Exception as error:
            _end(error)  # here, because Hydra would add lines of its own

    if processes.is_child():
        processes.follow_parent()
    try:
        check_form(sys.argv[1:], config_folder, config_name)
        if {"--help", "-h"} & set(sys.argv[1:]):
            _help(job, model, [argument for argument in sys.argv[1:] if not argument.startswith("-")])
            return
        hydra.main(config_path=str(config_folder.resolve()), config_name=config_name, version_base="1.3")(run)()
    except (KeyboardInterrupt, Interrupted, InputError) as error:
        _end(error)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, config_folder, config_name, sys.argv[1:]))
    except OSError as error:
        if begun:
            raise
        _fail(f"cannot create the folder {error.filename}: {error.strerror}; run in a folder that you can write to")


def recipe_name(choices: list[str]) -> str:
    """The recipe that train.py would use with these choices: the one chosen, else the data set's."""
    with hydra.initialize_config_dir(str(presets()), version_base="1.3"):
        return hydra.compose("train", choices, return_hydra_config=True).hydra.runtime.choices["recipe"]


def training(choices: list[str]) -> Training:
    """The settings of train.py from the choices of another command, for example data=ssv2 data.root=/data/ssv2.

    Raises:
        InputError: a choice is wrong.
    """
    return Training(**plain(compose(choices)))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as plain data.

    Raises:
        InputError: a required key is missing, or a key refers to another that does not exist.
    """
    try:
        content: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is not set; data={cfg.data.format} needs it") from None
    except OmegaConfBaseException as error:
        raise InputError(str(error)) from None
    return content


def compose(choices: list[str], name: str = "train") -> DictConfig:
    """The configuration of train or eval with these choices, unchecked.

    Raises:
        InputError: a choice is wrong.
    """
    folder = presets()
    try:
        check_form(choices, folder, name)
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            cfg = hydra.compose(name, choices)
            check_added(cfg, name, choices)
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, folder, name, choices)) from None


def _help(job: Callable, model: type[Training | Evaluation], choices: list[str]) -> None:
    """Print the help of the command, with the values that its keys have with these choices."""
    config: Any = OmegaConf.to_container(compose(choices, model.NAME), resolve=True)
    try:
        print_help(str(sys.modules[job.__module__].__doc__), model, config, presets())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_hyphens(arguments: list[str]) -> None:
    """End the program if a choice starts with hyphens, and say how to write it. Hydra would only print its usage."""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name.startswith("--") and not any(own.startswith(name) for own in _HYDRA):
            _fail(
                f"{argument}: choices have no leading hyphens; write {argument.lstrip('-')}. In a sweep of "
                "Weights & Biases, use ${args_no_hyphens} in `command`, as in scripts/sweep.yaml"
            )


def _in_thread(failure: threading.ExceptHookArgs) -> None:
    """Print a thread's error, unless it is PyTorch's pin-memory thread: it fails with a worker, which is reported."""
    if failure.thread is None or "_pin_memory_loop" not in failure.thread.name:
        threading.__excepthook__(failure)


def _end(error: BaseException) -> NoReturn:
    """End the program with one sentence if the reason is bad input or a signal; raise any other error again."""
    if isinstance(error, OmegaConfBaseException):
        error = InputError(str(error))
    elif isinstance(error, KeyboardInterrupt):
        error = Interrupted(signal.SIGINT)
    error, member = readable(error), processes.member()
    status = error.status if isinstance(error, Interrupted) else 2 if isinstance(error, InputError) else 1
    if member is not None:
        member.fail(error, status)
    if status == 1:
        raise error
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    elif launched.is_first():  # a signal, which all processes received
        print(error, file=sys.stderr)
    sys.exit(status)


def _fail(message: str) -> NoReturn:
    _end(InputError(message))
