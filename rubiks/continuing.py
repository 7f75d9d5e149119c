"""Resuming a run: what it was started with, what is asked for now, and what may differ."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from rubiks.choices import program, setting, text_of
from rubiks.data.datamodule import VideoDataModule
from rubiks.errors import InputError
from rubiks.models.checkpoint import SavedNetwork
from rubiks.runs import Run
from rubiks.training.position import Position, epoch_of
from rubiks.training.recipe import Recipe

# Settings that cannot change when a run is resumed.
FIXED = (
    "tier",
    "variant",
    "causal",
    "seed",
    "data.format",
    "data.level",
    "data.train_videos",
    "data.seed",
    "data.split",
    "data.num_frames",
    "data.num_classes",
    "data.balanced",
    "recipe.optimizer",
    "recipe.freeze",
    "init_temporal",
    "train_sha256",
    "manifest_sha256",
)
# Settings that do not affect what is learned; their changes are not printed.
SILENT = (
    "run",
    "init",
    "device",
    "logger",
    "checkpoint",
    "connect_timeout",
    "process_timeout",
    "patience",
    "data.name",
    "data.root",
    "data.train_list",
    "data.val_list",
    "data.val_videos",
    "data.labels",
    "data.videos",
    "data.lists",
    "data.release",
    "data.manifest",
    "data.workers",
    "data.reader",
    "data.timeout",
    "data.max_bad",
    "data.on_error",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "val_sha256",
    "processes",  # `recipe_for` tells
    "total_batch",
)
# What a validation score depends on, besides the network.
SCORE = (
    "recipe.ema_decay",
    "protocol",
    "data.size",
    "data.sampling",
    "data.window",
    "trainer.limit_val_batches",
    "val_sha256",
)
# What runs did that were started before a setting existed.
EARLIER = {"causal": False}

_NAMES = {
    "train_sha256": "the training list (videos, labels or their order)",
    "manifest_sha256": "the manifest of the videos (rubiks check)",
}


class Change(NamedTuple):
    """A setting that has changed."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return _NAMES.get(self.key) or f"{self.key}: {text_of(self.before)} -> {text_of(self.now)}"


def check(run: Run, saved: SavedNetwork, now: dict[str, Any], asked: list[str]) -> list[Change]:
    """What has changed since a run was started.

    Args:
        run: the run.
        saved: its last state, with the configuration it was saved with.
        now: the current configuration.
        asked: the current choices of the command line.

    Raises:
        InputError: the run cannot be resumed with these changes.
    """
    found = changes(saved.config, now)
    refused = fixed(found)
    if refused:
        started = run.choices.read_text(encoding="utf-8").splitlines() if run.choices.is_file() else []
        same_network = (saved.tier, saved.variant) == (now["tier"]["name"], now["variant"]["name"])
        raise refuse(refused, run.folder, started, asked, same_network)
    return found


def start(
    saved: SavedNetwork, trainer: pl.Trainer, data: VideoDataModule, epochs: int, max_steps: int | None
) -> Position:
    """The position from which a run resumes, adjusted to its current batches.

    Raises:
        InputError: the run has already trained more epochs than are asked for now.
    """
    if not saved.position:
        raise InputError(
            f"{saved.path} is from an earlier version and does not record where training stopped; start a new run from "
            f"its weights with init={saved.path}"
        )
    position = Position(**saved.position)
    if position.epoch > epochs or (position.epoch == epochs and position.videos):
        raise InputError(
            f"{saved.path} was saved after {position}, more than recipe.epochs={epochs}: raise recipe.epochs"
        )
    if max_steps is not None and position.steps >= max_steps:
        raise InputError(
            f"{saved.path} was saved after {position}, so trainer.max_steps={max_steps} has been reached: raise it or "
            "leave it out"
        )
    return epoch_of(trainer, data).settle(position)


def recipe_for(saved: SavedNetwork, recipe: Recipe, processes: int) -> tuple[Recipe, str]:
    """The recipe with which a run resumes, and a sentence for the user if the number of processes has changed.

    The total batch stays, as near as whole batches allow: `accumulate` follows the number of processes. If the recipe's
    own batch_size or accumulate has changed, it is used as it is.
    """
    before, total = saved.config.get("processes"), saved.config.get("total_batch")
    if total is None:  # from an earlier version
        return recipe, ""
    started = saved.config["recipe"]
    if (started["batch_size"], started["accumulate"]) == (recipe.batch_size, recipe.accumulate):
        recipe = recipe.near_total_batch(total, processes)
    if processes == before:
        return recipe, ""
    now = recipe.total_batch(processes)
    text = "as before" if now == total else f"instead of {total}, and learning rates change in proportion"
    return recipe, (
        f"{processes} process{'' if processes == 1 else 'es'} instead of {before}: the total batch is {now} {text} "
        f"(recipe.batch_size={recipe.batch_size}, recipe.accumulate={recipe.accumulate})"
    )


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The settings that differ between two configurations, sections written with dots."""
    old, new = flat({**EARLIER, **before}), flat(now)
    found = [Change(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    return [change for change in found if change.before != change.now]


def within(key: str, sections: Sequence[str]) -> bool:
    """Whether a key is one of these, or is in one of these sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def fixed(found: list[Change]) -> list[Change]:
    """The changes that a run cannot be resumed with."""

    def known(change: Change) -> bool:  # a manifest added or removed does not mean that the videos differ
        return not change.key.endswith("_sha256") or None not in (change.before, change.now)

    refused = [change for change in found if within(change.key, FIXED) and known(change)]
    # Leaving out init= is not a change: the weights come from the run itself.
    return refused + [change for change in found if change.key == "init" and change.now is not None]


def refuse(found: list[Change], folder: Path, started: list[str], asked: list[str], same_network: bool) -> InputError:
    """The error for changes that a run cannot be resumed with, with the commands that would work.

    Args:
        found: the changes.
        folder: the run's folder.
        started, asked: the command line's choices, then and now.
        same_network: the run's weights fit the network that is asked for.
    """
    what = "; ".join(map(str, found[:4])) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    other_weights = not same_network or any(change.key == "init" for change in found)
    anew = [choice for choice in asked if _key(choice) != "run" and (other_weights or _key(choice) != "init")]
    if not other_weights:
        anew.append(setting("init", folder / "checkpoints" / "last.ckpt"))
    return InputError(
        f"{folder} was started with other settings and cannot resume with these: {what}.\n"
        f"To resume: {command(folder, merged(started, asked, found))}\n"
        f"To start a new run{'' if other_weights else ' from its weights'}: {command(None, anew)}"
    )


def merged(started: list[str], asked: list[str], refused: list[Change]) -> list[str]:
    """The choices that the run was started with, updated with the current ones that do not cause a refused change."""
    groups = ("tier", "variant", "data", "recipe")
    dropped = {_key(choice) for choice in asked if any(within(change.key, (_key(choice),)) for change in refused)}
    if "variant" in dropped:
        dropped |= {_key(choice) for choice in asked if within(_key(choice), ("aq",))}  # a separate section
    dropped |= {"data"} if any(change.key in ("train_sha256", "manifest_sha256") for change in refused) else set()
    kept = {
        _key(choice): choice
        for choice in asked
        if _key(choice) not in dropped and _key(choice).partition(".")[0] not in dropped & set(groups)
    }
    return [kept.pop(_key(choice), choice) for choice in without_limits(started)] + list(kept.values())


def without_limits(choices: list[str]) -> list[str]:
    """Choices without the limits that would stop a resumed run again at once."""
    return [choice for choice in choices if _key(choice) not in ("trainer.max_steps", "patience")]


def command(folder: Path | None, choices: list[str]) -> str:
    """A train.py command to paste; `folder` names the run to resume."""
    own = [choice for choice in choices if folder is None or _key(choice) != "run"]
    return shlex.join([*program("train"), *([] if folder is None else [setting("run", folder.name)]), *own])


def _key(choice: str) -> str:
    return choice.partition("=")[0].lstrip("+~")


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a configuration, by their keys with dots."""
    leaves: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
