"""The weights that training starts from, and those that evaluation reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rubiks import naming, runs
from rubiks.choices import CommandLine
from rubiks.data.sources.annotations import nfc
from rubiks.errors import InputError
from rubiks.experiment import Evaluation, Training
from rubiks.export import exported
from rubiks.export.exported import ExportedNetwork
from rubiks.models import VARIANTS, RubiksNet, checkpoint, inflation
from rubiks.models.checkpoint import SavedNetwork

log = logging.getLogger(__name__)


def network(settings: Training, classes: Sequence[str], use_init: bool = True) -> RubiksNet:
    """A new network, or one that starts from the weights of `init`; frozen as far as the recipe says."""
    freeze = settings.recipe.freeze
    if freeze is not None and use_init and settings.init is None:
        raise InputError(f"recipe.freeze={freeze} would keep random weights; give the weights to start from, init=FILE")
    tier, variant = settings.tier.name, settings.variant.name
    frames, dropout = settings.data.sampling.num_frames, settings.recipe.dropout
    net = RubiksNet(tier, len(classes), variant, frames, dropout, settings.causal)
    if use_init and settings.init is not None:
        saved = checkpoint.read(settings.init)
        net.replace_classifier(saved.num_classes)
        if saved.variant == inflation.FROM and variant in inflation.INTO and saved.tier == tier:
            inflation.inflate(net, RubiksNet.from_saved(saved), settings.init_temporal)
            variants = ", to ".join(f"{name} ({VARIANTS[name].about})" for name in (saved.variant, variant))
            log.info(
                "init: inflated from %s, with temporal shifts by init_temporal=%s", variants, settings.init_temporal
            )
        else:
            _check_same_network(saved, tier, variant)
            checkpoint.load_weights(net, saved)
        # An official file does not name its classes: then only their number is compared.
        if saved.num_classes != len(classes) or (saved.classes is not None and not same_names(saved.classes, classes)):
            net.replace_classifier(len(classes))
            log.info("init: weights of %s, with a new classifier for %d classes", settings.init, len(classes))
        else:
            log.info("init: weights of %s, with its classifier", settings.init)
    if freeze is not None:
        net.backbone.freeze(freeze)
    return net


def _check_same_network(saved: SavedNetwork, tier: str, variant: str) -> None:
    """Raise InputError unless the checkpoint of `init` is of the chosen tier and variant."""
    if (saved.tier, saved.variant) != (tier, variant):
        raise InputError(
            f"init={saved.path} has tier={saved.tier} variant={saved.variant}, but tier={tier} variant={variant} is "
            f"chosen; add tier={saved.tier} variant={saved.variant}. The variants {', '.join(inflation.INTO)} can also "
            f"start from {inflation.FROM} of the same tier"
        )


def check_same_classes(saved: SavedNetwork | ExportedNetwork, classes: Sequence[str]) -> None:
    """Raise InputError unless a checkpoint's classes are the data set's, by name if the file has names."""
    if saved.num_classes != len(classes):
        raise InputError(f"{saved.path} has {saved.num_classes} classes, but the data set has {len(classes)}")
    if saved.classes is not None and not same_names(saved.classes, classes):
        label = next(i for i, (a, b) in enumerate(zip(saved.classes, classes, strict=True)) if nfc(a) != nfc(b))
        raise InputError(
            f"{saved.path} was trained on other classes: class {label} is {saved.classes[label]!r} there and "
            f"{classes[label]!r} in the data set; set data.labels to the list it was trained with"
        )


def same_names(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether names are the same, however accented letters are encoded: in NFC, or decomposed as on macOS."""
    return list(map(nfc, names)) == list(map(nfc, others))


def evaluated(settings: Evaluation, command: CommandLine) -> SavedNetwork | ExportedNetwork:
    """The checkpoint or exported file that `ckpt` names, which determines tier and variant."""
    path: str | Path | None = settings.ckpt
    sections = {"tier": settings.tier, "variant": settings.variant}
    chosen = {key: section.name for key, section in sections.items() if section is not None}
    if path == "latest":
        data = settings.data.source.name
        named = naming.named_run(settings.run, command)  # run=NAME may name a training run, which is then used
        found = named if named and checkpoint.in_run(named.folder) else runs.newest(data, **chosen)
        if found is None:
            wanted = " ".join(f"{key}={name}" for key, name in {"data": data, **chosen}.items())
            raise InputError(
                f"ckpt=latest: no run with {wanted} and a checkpoint in {runs.OUTPUTS.resolve()}. "
                "Train one with train.py, or give ckpt=FILE"
            )
        path = checkpoint.in_run(found.folder)
    if path is None:
        raise InputError(
            "ckpt is not set; give a checkpoint or exported file, a run's or a saved network's folder, or latest"
        )
    saved = exported.read(path)
    wrong = [f"{key}={name}" for key, name in chosen.items() if name != getattr(saved, key)]
    if wrong:
        raise InputError(
            f"ckpt={saved.path} has tier={saved.tier} variant={saved.variant}, but {' '.join(wrong)} is chosen; "
            "leave tier and variant out, they come from the checkpoint"
        )
    return saved
