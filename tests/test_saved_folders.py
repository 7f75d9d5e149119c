"""Networks saved as folders that describe themselves, and `rubiks convert`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL_TIER, assert_rejected
from test_self_describing import CLASSES, checkpoint_of

from rubiks import RubiksNet
from rubiks.cli.entry import compose, plain
from rubiks.errors import InputError
from rubiks.experiment import Evaluation, Training
from rubiks.files import sha256
from rubiks.models import TIERS, VARIANTS
from rubiks.models.preprocessing import Preprocessing
from rubiks.models.tiers import Tier

FILES = ["README.md", "config.json", "model.safetensors"]
SCORE = {
    "data": "k400",
    "protocol": "two_clip",
    "clips": 2,
    "crops": 3,
    "num_frames": 4,
    "crop_size": 112,
    "videos": 12345,
    "top1": 61.734,
    "top5": 87.25,
    "intervals": {"top1": [60.91, 62.58], "top5": [86.6, 87.9]},
    "date": "2026-11-22T17:15:00+00:00",
    "frame_order": "natural",
}


@pytest.fixture(autouse=True)
def _small_tiers(monkeypatch):
    """One narrow block in each stage of every tier; small keeps its squeeze-excite."""
    for name, tier in TIERS.items():
        monkeypatch.setitem(TIERS, name, Tier(SMALL_TIER.width, SMALL_TIER.blocks, tier.reduction and 6))


def network(variant: str = "rubiks3d", tier: str = "tiny", budget: float | None = None) -> RubiksNet:
    """A network with random weights and statistics."""
    net = RubiksNet(tier, 3, variant, num_frames=4).eval()
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and value.ndim:
            value.add_(0.1 * torch.randn_like(value))
    if budget is not None:
        net.harden(budget)
    net.classes = CLASSES
    net.preprocessing = Preprocessing(4, size=48, short_side=60, sampling="dense", window=16)
    return net


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved network."""
    network("rubiks3d-aq").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A run's folder with its best and its last checkpoint, and the results of the best."""
    checkpoints = tmp_path / "outputs/mine/checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(checkpoint_of(network()), checkpoints / "best.ckpt")
    torch.save(checkpoint_of(network(), epoch=9), checkpoints / "last.ckpt")
    results = SCORE | {"checkpoint_sha256": sha256(checkpoints / "best.ckpt")}
    (tmp_path / "outputs/mine/results.json").write_text(json.dumps(results))
    return tmp_path / "outputs/mine"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def same_network(net: RubiksNet, other: RubiksNet) -> None:
    """Both have the same weights and states, bit for bit, and give the same logits."""
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(clips), other(clips))
    ours, theirs = net.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name
    assert [shift.hard for shift in net.attention_shifts()] == [shift.hard for shift in other.attention_shifts()]


@pytest.mark.parametrize("tier", ["tiny", "small", "medium", "large"])
@pytest.mark.parametrize(
    ("variant", "budget"), [*((name, None) for name in VARIANTS), ("rubiks3d-aq", 0.125), ("rubiks3d-aq", 0.0)]
)
def test_a_network_comes_back_as_it_was(variant, budget, tier, tmp_path):
    net = network(variant, tier, budget)
    net.save_pretrained(tmp_path / "saved")
    again = RubiksNet.load_pretrained(tmp_path / "saved")
    same_network(net, again)
    assert (again.tier, again.variant, again.training) == (tier, variant, False)
    assert (again.classes, again.preprocessing, again.num_frames) == (CLASSES, net.preprocessing, 4)
    assert again.temporal_share() == net.temporal_share()


def test_what_is_in_the_folder(saved):
    assert sorted(contents(saved)) == FILES
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert config["classes"] == CLASSES
    assert (config["tier"], config["variant"], config["num_classes"]) == ("tiny", "rubiks3d-aq", 3)
    assert config["temporal_attention"] == {"hard": False, "temperature": 2.0, "share": None}
    assert "閉じる" in (saved / "config.json").read_text(encoding="utf-8")
    assert all(stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR for path in saved.iterdir())
    assert len({stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}) == 1  # all as the umask says


def test_unusual_memory_formats_are_saved(tmp_path):
    net = network().to(memory_format=torch.channels_last)
    net.save_pretrained(tmp_path / "saved")
    same_network(network_of(tmp_path / "saved"), net.to(memory_format=torch.contiguous_format))


def network_of(path: Path) -> RubiksNet:
    return RubiksNet.load_pretrained(path)


def test_a_saved_network_is_replaced_as_a_whole(saved, monkeypatch):
    other = network()
    (saved / "README.md").unlink()
    other.save_pretrained(saved)
    same_network(network_of(saved), other)
    assert sorted(contents(saved)) == FILES
    assert os.listdir(saved.parent) == ["saved"]


def test_a_network_can_be_saved_where_it_was_loaded(saved):
    before = contents(saved)
    network_of(saved).save_pretrained(saved)
    assert contents(saved) == before


def test_a_link_to_a_folder_stays(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    other = network()
    other.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    same_network(network_of(saved), other)


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_failed_save_leaves_what_was_there(step, saved, monkeypatch):
    before = contents(saved)
    function = getattr(os, step[3:])
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return function(*args)

    monkeypatch.setattr(step, fail)
    assert_rejected(lambda: network().save_pretrained(saved), f"{saved} cannot be written: No space left on device")
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["saved"]


@pytest.mark.parametrize("name", ["notes.txt", "model.onnx"])
def test_other_files_are_not_lost(name, saved):
    (saved / name).write_text("precious")
    before = contents(saved)
    assert_rejected(lambda: network().save_pretrained(saved), str(saved), name, "give a new folder")
    assert contents(saved) == before


def test_a_folder_of_another_program_is_not_replaced(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert_rejected(lambda: network().save_pretrained(folder), "not replaced", "'bert'")
    (folder / "config.json").unlink()
    (folder / "README.md").write_text("mine")
    assert_rejected(lambda: network().save_pretrained(folder), "not replaced", "config.json")
    (folder / "README.md").unlink()
    network().save_pretrained(folder)  # empty
    assert sorted(contents(folder)) == FILES


@pytest.mark.parametrize("name", ["net.pth.tar", "net.pth", "net.pt", "net.ckpt"])
def test_files_have_the_official_format(name, tmp_path):
    net = network("rubiks3d-aq", budget=0.125)
    net.save_pretrained(tmp_path / "new" / name)
    content = torch.load(tmp_path / "new" / name, weights_only=True)
    assert set(content) == {"tier", "variant", "num_classes", "num_frames", "model"}
    same_network(network_of(tmp_path / "new" / name), net)
    assert os.listdir(tmp_path / "new") == [name]


@pytest.mark.parametrize("name", ["net.safetensors", "net.tar"])
def test_names_of_other_files_are_refused(name, tmp_path):
    assert_rejected(lambda: network().save_pretrained(tmp_path / name), name, ".pth.tar")
    assert not (tmp_path / name).exists()


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "net").write_text("mine")
    assert_rejected(lambda: network().save_pretrained(tmp_path / "net"), "net is a file")


@pytest.mark.parametrize(
    ("classes", "words"),
    [(["a", "b"], "2 class names for 3 classes"), (["a", "b", 3], "classes.2: Input should be a valid string, got 3")],
)
def test_wrong_class_names_are_refused(classes, words, tmp_path):
    net = network()
    net.classes = classes
    assert_rejected(lambda: net.save_pretrained(tmp_path / "saved"), "cannot be saved", words)
    assert not (tmp_path / "saved").exists()


def test_class_names_that_are_not_text_come_back(tmp_path):
    """As of folders whose names are not UTF-8."""
    net = network()
    net.classes = ["a", os.fsdecode(b"caf\xe9"), "\\udce9"]
    net.save_pretrained(tmp_path / "saved")
    assert network_of(tmp_path / "saved").classes == net.classes


def cut(name: str, share: float = 0.5):
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return damage


def flip_a_bit(folder: Path) -> None:
    whole = bytearray((folder / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (folder / "model.safetensors").write_bytes(whole)


def weights_of(net: RubiksNet, knows: bool):
    """The weights of another network, which config.json knows of or not."""

    def damage(folder: Path) -> None:
        net().save_pretrained(folder.parent / "other")
        shutil.copy(folder.parent / "other/model.safetensors", folder)
        if knows:
            change_config(folder, weights_sha256=sha256(folder / "model.safetensors"))

    return damage


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    change_config(folder, weights_sha256=sha256(folder / "model.safetensors"))


WRONG = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json cannot be read: No such file"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors cannot be read: No such file"]),
    "half a config": (cut("config.json"), ["config.json is damaged, it is not JSON"]),
    "an empty config": (cut("config.json", 0), ["config.json is damaged, it is not JSON"]),
    "bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json is damaged"]),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json is of another program", "got None"]),
    "a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        ["config.json cannot be read: Is a directory"],
    ),
    "another program": (lambda f: change_config(f, model_type="bert"), ["of another program", "'bert'"]),
    "a later format": (
        lambda f: change_config(f, format_version=2, rubiks_version="9.0"),
        ["format_version 2", "install rubiks 9.0 or later"],
    ),
    "tier": (lambda f: change_config(f, tier="huge"), ["config.json: tier", "tiny, small", "'huge'"]),
    "variant": (lambda f: change_config(f, variant="4d"), ["config.json: variant", "rubiks3d", "'4d'"]),
    "count": (lambda f: change_config(f, num_classes=0), ["config.json: num_classes", "got 0"]),
    "names": (lambda f: change_config(f, classes=["a"]), ["config.json", "1 class names for 3 classes"]),
    "clip": (
        lambda f: change_config(f, preprocessing={"num_frames": "many"}),
        ["config.json: preprocessing.num_frames", "'many'"],
    ),
    "score": (
        lambda f: change_config(f, source={"evaluation": {"top1": "high"}}),
        ["config.json: source.evaluation"],
    ),
    "half the weights": (cut("model.safetensors"), ["model.safetensors is damaged"]),
    "a flipped bit": (flip_a_bit, ["model.safetensors is damaged", "SHA-256"]),
    "other weights": (
        weights_of(lambda: network("rubiks3d-aq"), False),
        ["model.safetensors is damaged, or of another"],
    ),
    "not safetensors": (not_safetensors, ["model.safetensors cannot be read"]),
    "another tier": (
        weights_of(lambda: network("rubiks3d-aq", "small"), True),
        ["does not fit tier tiny", "unknown", "layer1.0.se.fc.0.weight"],
    ),
    "another count": (
        weights_of(lambda: network("rubiks3d-aq").replace_classifier(5), True),
        ["does not fit", "new_fc.weight is (5, ", "expected (3, "],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_folder_gives_one_clear_error(wrong, saved):
    damage, words = WRONG[wrong]
    damage(saved)
    assert_rejected(lambda: RubiksNet.load_pretrained(saved), str(saved), *words)


def test_an_empty_folder_is_neither_a_run_nor_a_saved_network(tmp_path):
    assert_rejected(
        lambda: RubiksNet.load_pretrained(tmp_path), str(tmp_path), "checkpoints/best.ckpt", "model.safetensors"
    )


# ---- runs and their scores


def test_a_run_gives_its_best_checkpoint(run_folder):
    net = RubiksNet.load_pretrained(run_folder)
    assert (net.source["file"], net.source["epoch"]) == ("mine/checkpoints/best.ckpt", 7)
    (run_folder / "checkpoints/best.ckpt").unlink()
    net = RubiksNet.load_pretrained(run_folder)
    assert (net.source["file"], net.source["epoch"]) == ("mine/checkpoints/last.ckpt", 9)


def test_the_score_of_a_checkpoint_stays_with_its_weights(run_folder, tmp_path):
    net = RubiksNet.load_pretrained(run_folder)
    assert net.source["evaluation"]["top1"] == 61.734
    net.save_pretrained(tmp_path / "saved")
    again = RubiksNet.load_pretrained(tmp_path / "saved")
    assert again.source == net.source
    assert again.source["evaluation"]["intervals"] == {"top1": (60.91, 62.58), "top5": (86.6, 87.9)}


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_sha256": "0" * 64},
        {"frame_order": "shuffled"},
        {"top1": None},
        {"intervals": {}},
    ],
)
def test_a_score_of_something_else_is_not_taken(change, run_folder):
    path = run_folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "evaluation" not in RubiksNet.load_pretrained(run_folder).source


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_damaged_results_are_no_score(text, run_folder):
    (run_folder / "results.json").write_text(text)
    assert "evaluation" not in RubiksNet.load_pretrained(run_folder).source
    assert "evaluation" not in RubiksNet.load_pretrained(run_folder / "checkpoints/last.ckpt").source


@pytest.mark.parametrize("act", [lambda net: net.train(), lambda net: net.replace_classifier(3)])
def test_weights_that_change_have_no_score(act, run_folder):
    net = RubiksNet.load_pretrained(run_folder)
    act(net)
    assert "evaluation" not in net.source
    assert net.source["data"] == "k400"


def test_a_network_that_is_hardened_has_no_score():
    net = network("rubiks3d-aq")
    net.source = {"file": "a", "evaluation": SCORE}
    assert net.harden(0.5).source == {"file": "a"}


# ---- the model card


def card_of(net: RubiksNet, folder: Path) -> tuple[dict, str]:
    """The YAML header and the text of the model card."""
    net.save_pretrained(folder)
    start, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), text


def test_the_model_card_of_an_evaluated_run(run_folder, tmp_path):
    net = RubiksNet.load_pretrained(run_folder)
    header, text = card_of(net, tmp_path / "saved")
    assert header["pipeline_tag"] == "video-classification"
    assert header["library_name"] == "rubiks"
    assert "license" not in header
    parameters = sum(parameter.numel() for parameter in net.parameters())
    for words in (
        f"{parameters:,} parameters",
        "61.7% (60.9 to 62.6)",
        "87.2% (86.6 to 87.9)",
        "| 12,345 |",
        "| k400 | two_clip: 2 x 3 views of 4 frames, 112 pixels |",
        "Measured with `rubiks eval` on 2026-11-22.",
        "| trained on | k400, 7 epochs |",
        "`mine/checkpoints/best.ckpt`",
        "at equal steps within 32 frames",
        "short side resized to 128 pixels, then cropped to 112 x 112",
        "Classes: Öffnen; 閉じる; push, then pull.",
        "rubiks eval ckpt=saved data=kinetics data.root=FOLDER protocol=two_clip",
        "## Limits",
        "ECCV",
    ):
        assert words in text, words
    assert str(tmp_path) not in text
    assert "temporal attention |" not in text


def test_the_model_card_says_what_is_not_known(tmp_path):
    _, text = card_of(RubiksNet("tiny", 174), tmp_path / "saved")
    assert "Not known: these weights had not been evaluated" in text
    for absent in ("trained on", "| from |", "Classes:", "95%", "None"):
        assert absent not in text, absent
    assert "one from each of as many equal segments" in text


@pytest.mark.parametrize(
    ("budget", "words"), [(None, "| soft, at temperature 2 |"), (0.125, "hard: {:.2%} of the channels move")]
)
def test_the_model_card_describes_the_temporal_attention(budget, words, tmp_path):
    net = network("rubiks3d-aq", budget=budget)
    _, text = card_of(net, tmp_path / "saved")
    assert words.format(net.temporal_share() or 0) in text


def test_the_model_card_lists_a_few_of_many_classes(tmp_path):
    net = RubiksNet("tiny", 400)
    net.classes = [f"class\n{number}" for number in range(400)]
    _, text = card_of(net, tmp_path / "saved")
    assert "class 10; class 11; and 388 more, all in config.json." in text
    assert "class 12" not in text


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
def test_what_the_model_card_shows_can_be_run(variant, tmp_path, monkeypatch):
    net = network(variant)
    _, text = card_of(net, tmp_path / "it's mine")
    monkeypatch.chdir(tmp_path)
    blocks = dict.fromkeys(("sh", "python"), "")
    for part in text.split("```")[1::2]:
        language, _, code = part.partition("\n")
        if language in blocks:
            blocks[language] += code
    shown: list[str] = []
    exec(blocks["python"], {"print": shown.append})
    assert shown[0] in CLASSES
    lines = [
        shlex.split(line.replace("NAME", "csv").replace("FILE", "list.csv"), comments=True)
        for line in blocks["sh"].splitlines()
    ]
    models = {"eval": Evaluation, "train": Training}
    commands = {words[1]: words[2:] for words in lines if words}
    assert commands.keys() == {"eval", "train", "info", "predict"}
    assert commands["info"] == ["it's mine"]
    assert commands["predict"] == ["it's mine", "clip.mp4"]
    for name, model in models.items():
        settings = model(**plain(compose(commands[name], name)))
        assert (settings.ckpt if name == "eval" else settings.init) == "it's mine"


# ---- commands


@pytest.mark.parametrize("source", ["run", "checkpoint", "official", "saved"])
@pytest.mark.parametrize("dest", ["new", "new.pth.tar"])
def test_convert(source, dest, run_folder, saved, tmp_path, rubiks_command):
    network().save_pretrained(tmp_path / "ssv2.pth.tar")
    sources = {
        "run": run_folder,
        "checkpoint": run_folder / "checkpoints/last.ckpt",
        "official": tmp_path / "ssv2.pth.tar",
        "saved": saved,
    }
    status, out, err = rubiks_command("convert", sources[source], tmp_path / dest)
    assert status == 0
    first, again = RubiksNet.load_pretrained(sources[source]), RubiksNet.load_pretrained(tmp_path / dest)
    assert out.startswith(f"{tmp_path / dest}: tier tiny, variant {first.variant}, 3 classes, ")
    same_network(first, again)
    if dest == "new":
        assert (again.classes, again.preprocessing, again.source) == (first.classes, first.preprocessing, first.source)
        assert err == ""
    else:
        assert again.classes is None
        assert ("they are left out" in err) is (first.classes is not None)
        content = torch.load(tmp_path / dest, weights_only=True)
        assert set(content) == {"tier", "variant", "num_classes", "num_frames", "model"}


def test_convert_replaces_only_when_asked(saved, tmp_path, rubiks_command):
    network().save_pretrained(tmp_path / "net.pth.tar")
    for dest in (saved, tmp_path / "net.pth.tar"):
        source = tmp_path / "net.pth.tar" if dest == saved else saved
        status, out, err = rubiks_command("convert", source, dest)
        assert (status, out) == (2, "")
        assert f"error: {dest} exists; add --force" in err
        assert rubiks_command("convert", source, dest, "--force")[0] == 0
    (saved / "notes.txt").write_text("precious")
    status, _, err = rubiks_command("convert", tmp_path / "net.pth.tar", saved, "--force")
    assert status == 2
    assert "notes.txt" in err


def test_convert_refuses_what_is_no_network(tmp_path, rubiks_command):
    torch.save({"model": InputError}, tmp_path / "code.pth.tar")
    for source, words in (("code.pth.tar", "could run code"), ("none", "no checkpoint at"), (".", "is a folder")):
        status, out, err = rubiks_command("convert", tmp_path / source, tmp_path / "new")
        assert (status, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_info_takes_a_saved_network(saved, rubiks_command):
    status, out, _ = rubiks_command("info", saved, "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["clip"], facts["num_classes"], facts["variant"]) == ([4, 3, 48, 48], 3, "rubiks3d-aq")
    assert (facts["file"], facts["file_bytes"]) == (
        str(saved / "model.safetensors"),
        (saved / "model.safetensors").stat().st_size,
    )
