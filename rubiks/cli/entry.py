"""Running a Hydra entry point, with errors that a person can act on."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import rubiks
from rubiks.errors import InputError

# Hydra's own arguments with a value.
_HYDRA = ("--cfg", "--config-dir", "--config-name", "--config-path", "--experimental-rerun", "--info", "--package")


def launch(job: Callable[[DictConfig], None], config_folder: Path, config_name: str) -> None:
    """Compose the configuration from the command line and run the job with it.

    Bad input ends the program with one message on stderr and exit status 2. Anything else is a defect and keeps its
    traceback.
    """
    # Hydra would print its own shortened traceback and end the process before the cause can be told.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # The data module leaves out the videos that were seen before an interruption, which Lightning cannot know.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a run that goes on
    warnings.filterwarnings("ignore", "GPU available but not used")  # device=cpu says so
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 with PyTorch 2.14 and later

    threading.excepthook = _in_thread
    _refuse_hyphens(sys.argv[1:])
    begun = False

    def run(cfg: DictConfig) -> None:
        nonlocal begun
        begun = True
        folder = HydraConfig.get().runtime.output_dir
        message = None
        try:
            job(cfg)
        except (InputError, OmegaConfBaseException) as error:
            message = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            message = f"no space left on the device that holds {error.filename or folder}; free some and start again"
        with contextlib.suppress(OSError):  # Hydra makes the folder in any case; one with files stays
            os.rmdir(folder)
        if message is not None:
            _fail(message)

    try:
        hydra.main(config_path=str(config_folder.resolve()), config_name=config_name, version_base="1.3")(run)()
    except KeyboardInterrupt:
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_explain(error, config_folder, config_name))
    except OSError as error:
        if begun:
            raise
        _fail(f"the run's folder {error.filename} cannot be made: {error.strerror}; start where you may write")


def setting(key: str, value: object) -> str:
    """key=value as a choice that Hydra understands, quoted where the value has spaces, braces and the like."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if re.fullmatch(r"[\w./+-]+", text):
        return f"{key}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def recipe_name(choices: list[str]) -> str:
    """The recipe that train.py would take with these choices: the one chosen, else the data set's."""
    chosen = dict(choice.split("=", 1) for choice in choices if choice.startswith(("data=", "recipe=")))
    return chosen.get("recipe", chosen.get("data", "builtin"))


def compose(choices: list[str]) -> DictConfig:
    """The configuration of train.py with the choices of another command, for example data=ssv2 data.root=/data/ssv2.

    Raises:
        InputError: a choice is wrong, or the folder of configurations is not to be found.
    """
    places = [Path(rubiks.__file__).resolve().parents[1] / "conf", Path("conf").resolve()]
    folder = next((place for place in places if (place / "train.yaml").is_file()), None)
    if folder is None:
        raise InputError(f"no folder conf with train.yaml: run this in the project's folder, not in {Path.cwd()}")
    try:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            return hydra.compose("train", choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error, folder, "train")) from None


def _refuse_hyphens(arguments: list[str]) -> None:
    """End the program where a choice has hyphens before it, with how to write it. Hydra would print its usage."""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name.startswith("--") and not any(own.startswith(name) for own in _HYDRA):
            _fail(
                f"{argument} is not a choice, which has no hyphens before it: write {argument.lstrip('-')}; in a sweep "
                "of Weights & Biases use ${args_no_hyphens} in `command`, as scripts/sweep.yaml does"
            )


def _in_thread(failure: threading.ExceptHookArgs) -> None:
    """Print what a thread failed with, but for PyTorch's that pins memory: it fails with a worker, which is told."""
    if failure.thread is None or "_pin_memory_loop" not in failure.thread.name:
        threading.__excepthook__(failure)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _explain(error: Exception, config_folder: Path, config_name: str) -> str:
    """Hydra's message, and for an unknown key the keys that there are."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.msg and cause.msg.splitlines()[0] not in lines[0]:
        lines.append(cause.msg.splitlines()[0])
    message = "\n".join(lines)
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is not in struct|does not exist)", message)
    if unknown is None:
        return message
    key = unknown.group(1) or unknown.group(2)
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        choices = _keys(config_folder, config_name)
        section = [choice for choice in choices if choice.rpartition(".")[0] == key.rpartition(".")[0]]
        near = difflib.get_close_matches(key, choices, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        listed = ", ".join(sorted(section or {choice.partition(".")[0] for choice in choices}))
        return f"{key} is not a key of the configuration.{hint} The choices are {listed}"
    return message


def _keys(config_folder: Path, config_name: str) -> list[str]:
    """Every key of the configuration with the groups as chosen on the command line, sections included."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder.resolve()), version_base="1.3"):
        groups = {path.name for path in config_folder.iterdir() if path.is_dir()}
        chosen = [argument for argument in sys.argv[1:] if argument.partition("=")[0] in groups]
        tree = OmegaConf.to_container(hydra.compose(config_name, chosen), resolve=False)
    assert isinstance(tree, dict)
    keys: list[str] = []

    def walk(node: dict, prefix: str) -> None:
        for name, value in node.items():
            keys.append(prefix + name)
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")

    walk(tree, "")
    return keys
