"""Where a network's weights come from: `init` for a training, `ckpt` for an evaluation."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from configurations import command_line, training
from conftest import assert_rejected

from rubiks import RubiksNet, weights
from rubiks.choices import CommandLine
from rubiks.cli.entry import plain
from rubiks.errors import InputError
from rubiks.experiment import Evaluation
from rubiks.models import checkpoint
from rubiks.models.checkpoint import SavedNetwork
from rubiks.models.preprocessing import Preprocessing

CLASSES = ["turn left", "turn right", "jump"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of networks: official ones, which do not name their classes, and one of ours, which does."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(1)
    for name, tier, variant, count in (
        ("official.pth.tar", "tiny", "rubiks3d", 3),
        ("five.pth.tar", "tiny", "rubiks3d", 5),
        ("flat.pth.tar", "tiny", "rubiks2d", 3),
        ("small.pth.tar", "small", "rubiks3d", 3),
        ("aq.pth.tar", "tiny", "rubiks3d-aq", 3),
    ):
        RubiksNet(tier, count, variant, num_frames=8).save_pretrained(folder / name)
    content = torch.load(folder / "official.pth.tar", weights_only=True)
    state = {f"net.{key}": value for key, value in content.pop("model").items()}
    torch.save({"rubiks": {**content, "classes": CLASSES}, "state_dict": state}, folder / "ours.ckpt")
    RubiksNet.load_pretrained(folder / "ours.ckpt").save_pretrained(folder / "saved")
    return folder


def network(folder: Path, file: str | None, classes: list[str], variant: str = "rubiks3d", **changes: object):
    init = None if file is None else str(folder / file)
    return weights.network(training(f"variant={variant}", init=init, **changes), classes)


def tensors(net: RubiksNet, classifier: bool) -> dict[str, torch.Tensor]:
    """The weights of the classifier, or all others."""
    return {key: value for key, value in net.state_dict().items() if key.startswith("new_fc") == classifier}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)


# ---- init


@pytest.mark.parametrize(
    ("file", "classes", "kept"),
    [
        ("ours.ckpt", CLASSES, True),
        ("ours.ckpt", ["turn right", "turn left", "jump"], False),
        ("ours.ckpt", CLASSES[:2], False),
        ("ours.ckpt", [*CLASSES, "run"], False),
        ("saved", CLASSES, True),
        ("saved", ["turn right", "turn left", "jump"], False),
        ("official.pth.tar", ["a", "b", "c"], True),
        ("official.pth.tar", ["a", "b"], False),
        ("five.pth.tar", CLASSES, False),
    ],
)
def test_a_training_starts_from_the_weights_of_init(file, classes, kept, folder, caplog):
    caplog.set_level("INFO")
    net = network(folder, file, classes, data__num_frames=4)
    given = RubiksNet.load_pretrained(folder / file)
    assert equal(tensors(net, classifier=False), tensors(given, classifier=False))
    assert equal(tensors(net, classifier=True), tensors(given, classifier=True)) == kept
    assert (net.num_classes, net.num_frames) == (len(classes), 4)
    assert ("with its classifier" in caplog.text) == kept
    assert (f"with a new classifier for {len(classes)} classes" in caplog.text) == (not kept)


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
def test_a_causal_training_starts_from_the_weights_of_another_network_without_looking_ahead(variant, folder):
    file = {"rubiks3d": "ours.ckpt", "rubiks3d-aq": "aq.pth.tar"}[variant]
    given = RubiksNet.load_pretrained(folder / file).state_dict()
    net = network(folder, file, CLASSES, variant, causal=True)
    for name, value in net.state_dict().items():
        if name.endswith("rubiks3d.shift"):
            assert given[name][0].max() > 0
            given[name][0].clamp_(max=0)
        assert torch.equal(value, given[name])
    assert net.causal
    net.stream()


def test_a_causal_network_may_become_one_that_looks_ahead(folder, tmp_path):
    RubiksNet("tiny", 3, causal=True).save_pretrained(tmp_path / "causal")
    net = network(tmp_path, "causal", CLASSES)
    assert equal(net.state_dict(), RubiksNet.load_pretrained(tmp_path / "causal").state_dict())
    assert not net.causal


def test_without_init_or_in_a_run_that_goes_on_the_weights_are_new(folder):
    given = tensors(RubiksNet.load_pretrained(folder / "ours.ckpt"), classifier=False)
    assert not equal(tensors(network(folder, None, CLASSES), classifier=False), given)
    settings = training(init=str(folder / "ours.ckpt"))
    assert not equal(tensors(weights.network(settings, CLASSES, use_init=False), classifier=False), given)


@pytest.mark.parametrize("rule", ["tsm", "uniform", "zero"])
@pytest.mark.parametrize("count", [3, 4])
def test_a_network_of_images_is_inflated_by_init_temporal(rule, count, folder, caplog):
    caplog.set_level("INFO")
    classes = [str(label) for label in range(count)]
    net = network(folder, "flat.pth.tar", classes, init_temporal=rule)
    assert (
        f"from rubiks2d (2D shift), to rubiks3d (3D shift), with temporal shifts by init_temporal={rule}" in caplog.text
    )
    flat = RubiksNet.load_pretrained(folder / "flat.pth.tar")
    assert torch.equal(net.backbone.conv1.weight, flat.backbone.conv1.weight)
    assert equal(tensors(net, classifier=True), tensors(flat, classifier=True)) == (count == 3)
    offsets = net.backbone.layer4[1].shift.shift
    assert torch.equal(offsets[1:], flat.backbone.layer4[1].shift.shift)
    time, eighth = offsets[0], len(offsets[0]) // 8
    if rule == "tsm":
        assert sorted(time.tolist()) == [-1] * eighth + [0] * (len(time) - 2 * eighth) + [1] * eighth
    else:
        assert time.abs().max() < (0.25 if rule == "uniform" else 0.06)
        assert (time.std() > 0.1) == (rule == "uniform")


def test_a_network_of_images_goes_on_without_time_as_it_is(folder):
    net, flat = network(folder, "flat.pth.tar", CLASSES, "rubiks2d"), RubiksNet.load_pretrained(folder / "flat.pth.tar")
    assert equal(net.state_dict(), flat.state_dict())


@pytest.mark.parametrize(
    ("file", "variant", "changes", "words"),
    [
        ("small.pth.tar", "rubiks3d", {}, ["init=", "small.pth.tar has tier=small variant=rubiks3d, but tier=tiny "]),
        ("small.pth.tar", "rubiks3d", {}, ["is chosen; add tier=small variant=rubiks3d. The variants "]),
        ("official.pth.tar", "grouped", {}, ["has tier=tiny variant=rubiks3d, but tier=tiny variant=grouped is"]),
        ("official.pth.tar", "rubiks2d", {}, ["has tier=tiny variant=rubiks3d", "can also start from rubiks2d"]),
        ("official.pth.tar", "rubiks3d-aq", {}, ["has tier=tiny variant=rubiks3d, but"]),
        ("flat.pth.tar", "grouped", {}, ["variant=grouped is chosen"]),
        ("flat.pth.tar", "rubiks3d", {"tier__name": "small"}, ["tier=small variant=rubiks3d is chosen"]),
        ("flat.pth.tar", "fixed-tsm", {"init_temporal": "zero"}, ["init_temporal must be tsm", "'zero'"]),
        ("flat.pth.tar", "rubiks3d", {"init_temporal": "one"}, ["init_temporal must be one of tsm, uniform", "'one'"]),
        ("ours.ckpt", "rubiks3d", {"init_temporal": None}, ["init_temporal must be one of tsm, uniform, zero", "None"]),
        ("nowhere.ckpt", "rubiks3d", {}, ["nowhere.ckpt"]),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(file, variant, changes, words, folder):
    assert_rejected(lambda: network(folder, file, CLASSES, variant, **changes), *words)


# ---- the classes of a checkpoint


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["cafe\u0301", "b"], ["caf\u00e9", "b"], None),
        (None, ["a", "b"], None),
        (None, ["a", "b", "c"], ["FILE has 2 classes, but the data set has 3"]),
        (["a", "b"], ["a"], ["FILE has 2 classes, but the data set has 1"]),
        (["a", "b", "c"], ["a", "c", "b"], ["class 1 is 'b' there and 'c' in the data set; set data.labels"]),
        (["cafe\u0301", "b"], ["caf\u00e9", "x"], ["class 1 is 'b' there and 'x' in the data set"]),
    ],
)
def test_a_checkpoint_of_other_classes_is_refused(theirs, ours, words):
    saved = SavedNetwork("FILE", "tiny", "rubiks3d", len(theirs or ["a", "b"]), Preprocessing(8), {}, classes=theirs)
    if words is None:
        weights.check_same_classes(saved, ours)
    else:
        assert_rejected(lambda: weights.check_same_classes(saved, ours), "FILE", *words)


@pytest.mark.parametrize("classes", [["caf\u00e9", "b", "c"], ["cafe\u0301", "b", "c"]])
def test_a_classifier_is_kept_however_accents_are_written(classes, folder, tmp_path):
    content = torch.load(folder / "ours.ckpt", weights_only=True)
    content["rubiks"]["classes"] = ["caf\u00e9", "b", "c"]
    torch.save(content, tmp_path / "accents.ckpt")
    net = network(tmp_path, "accents.ckpt", classes)
    assert torch.equal(net.new_fc.weight, content["state_dict"]["net.new_fc.weight"])


# ---- ckpt


def evaluated(*choices: str) -> SavedNetwork:
    settings = Evaluation(**plain(command_line("eval", *choices)))
    return weights.evaluated(settings, CommandLine(list(choices)))


@pytest.fixture
def runs(folder, tmp_path, monkeypatch):
    """Folders of runs with the files that an evaluation reads, from the oldest to the newest."""
    monkeypatch.chdir(tmp_path)
    for age, (name, data, source, file) in enumerate(
        (
            ("first", "builtin-plain", "official", "best"),
            ("second", "builtin-plain", "small", "last"),
            ("third", "builtin-plain", "official", "best"),
            ("fourth", "builtin-plain", "aq", "best"),
            ("other", "builtin-textured", "official", "last"),
            ("empty", "builtin-plain", "official", None),
        )
    ):
        tier, variant = {"small": "small"}.get(source, "tiny"), {"aq": "rubiks3d-aq"}.get(source, "rubiks3d")
        checkpoints = tmp_path / "outputs" / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        names = {"data": data, "tier": tier, "variant": variant}
        config = yaml.safe_dump({key: {"name": value} for key, value in names.items()})
        (checkpoints.parent / "config.yaml").write_text(config)
        if file is not None:
            shutil.copy(folder / f"{source}.pth.tar", checkpoints / f"{file}.ckpt")
            os.utime(checkpoints / f"{file}.ckpt", (age, age))


@pytest.mark.parametrize(
    ("choices", "path"),
    [
        ([], "outputs/fourth/checkpoints/best.ckpt"),
        (["ckpt=latest"], "outputs/fourth/checkpoints/best.ckpt"),
        (["tier=tiny"], "outputs/fourth/checkpoints/best.ckpt"),
        (["variant=rubiks3d-aq", "aq.budget=0.5"], "outputs/fourth/checkpoints/best.ckpt"),
        (["variant=rubiks3d"], "outputs/third/checkpoints/best.ckpt"),
        (["tier=tiny", "variant=rubiks3d"], "outputs/third/checkpoints/best.ckpt"),
        (["tier=small"], "outputs/second/checkpoints/last.ckpt"),
        (["tier=small", "variant=rubiks3d"], "outputs/second/checkpoints/last.ckpt"),
        (["data.level=textured"], "outputs/other/checkpoints/last.ckpt"),
        (["run=first"], "outputs/first/checkpoints/best.ckpt"),
        (["run=second"], "outputs/second/checkpoints/last.ckpt"),
        (["run=empty"], "outputs/fourth/checkpoints/best.ckpt"),
        (["run=new"], "outputs/fourth/checkpoints/best.ckpt"),
        (["run=fourth", "variant=rubiks3d-aq"], "outputs/fourth/checkpoints/best.ckpt"),
        (["run=first", "ckpt=outputs/second"], "outputs/second/checkpoints/last.ckpt"),
        (["ckpt=outputs/first"], "outputs/first/checkpoints/best.ckpt"),
        (["ckpt=outputs/first/checkpoints/best.ckpt"], "outputs/first/checkpoints/best.ckpt"),
    ],
)
def test_the_checkpoint_that_is_evaluated(choices, path, runs):
    saved = evaluated(*choices)
    assert saved.path == path
    expected = checkpoint.read(path)
    assert (saved.tier, saved.variant) == (expected.tier, expected.variant)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (["tier=large"], ["ckpt=latest: no run with data=builtin-plain tier=large and a checkpoint in "]),
        (["variant=grouped"], ["no run with data=builtin-plain variant=grouped and", "/outputs. T", "ckpt=FILE"]),
        (["data=csv"], ["no run with data=csv and a checkpoint"]),
        (["ckpt=outputs/empty"], ["outputs/empty is a folder without checkpoints/best.ckpt"]),
        (["ckpt=nowhere"], ["nowhere"]),
        (["ckpt=outputs/first", "tier=small"], [
            "ckpt=outputs/first/checkpoints/best.ckpt has tier=tiny variant=rubiks3d, but tier=small is chosen; l",
        ]),
        (["ckpt=outputs/first", "tier=small", "variant=grouped"], ["but tier=small variant=grouped is chosen"]),
        (["ckpt=outputs/first", "tier=tiny", "variant=grouped"], ["but variant=grouped is chosen"]),
        (["run=second", "tier=tiny"], ["outputs/second/checkpoints/last.ckpt has tier=small", "tier=tiny is chosen"]),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(choices, words, runs):
    assert_rejected(lambda: evaluated(*choices), *words)


def test_an_evaluation_of_nothing():
    with pytest.raises(InputError, match=r"^ckpt is not set; .* latest$"):
        evaluated("ckpt=null")
