"""What a network knows about itself: its classes, the input it is meant for, and where it comes from."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_rejected

from rubiks import RubiksNet
from rubiks.models.checkpoint import META_KEY, NET_PREFIX
from rubiks.models.preprocessing import Preprocessing

CLASSES = ["Öffnen", "閉じる", "push, then pull"]
DENSE = {"name": "k400", "format": "kinetics", "size": 112, "sampling": "dense", "window": 32, "num_frames": 4}

pytestmark = pytest.mark.usefixtures("small_network")


def checkpoint_of(net: RubiksNet, **meta) -> dict:
    """A checkpoint of ours, as training writes it, without what only training needs."""
    facts = {
        "tier": net.tier,
        "variant": net.variant,
        "num_classes": net.num_classes,
        "num_frames": net.num_frames,
        "classes": CLASSES,
        "config": {"data": DENSE, "protocol": {"name": "one_clip"}},
        "epoch": 7,
    }
    return {"state_dict": {NET_PREFIX + key: value for key, value in net.state_dict().items()}, META_KEY: facts | meta}


@pytest.fixture
def trained(tmp_path) -> RubiksNet:
    """A network from a checkpoint of a run."""
    path = tmp_path / "mine.ckpt"
    torch.save(checkpoint_of(RubiksNet("tiny", 3, num_frames=4)), path)
    return RubiksNet.load_pretrained(path)


def test_a_new_network_expects_the_official_input_and_knows_no_classes():
    net = RubiksNet("tiny", 3, num_frames=16)
    assert net.preprocessing == Preprocessing(16, size=224, short_side=None, sampling="uniform")
    assert (net.preprocessing.resized, net.classes, net.source) == (256, None, {})


def test_an_official_file_says_nothing_more(tmp_path):
    RubiksNet("tiny", 3, num_frames=8).save_pretrained(tmp_path / "ssv2.pth.tar")
    net = RubiksNet.load_pretrained(tmp_path / "ssv2.pth.tar")
    assert (net.classes, net.preprocessing) == (None, Preprocessing(8))
    assert net.source == {"file": "ssv2.pth.tar"}


def test_a_checkpoint_says_what_the_run_was_trained_on(trained):
    assert trained.classes == CLASSES
    assert trained.preprocessing == Preprocessing(4, size=112, sampling="dense", window=32)
    assert trained.preprocessing.resized == 128
    assert trained.num_frames == 4
    source = {"file": "mine.ckpt", "epoch": 7, "data": "k400", "format": "kinetics", "protocol": "one_clip"}
    assert trained.source == source


def test_a_checkpoint_without_a_configuration_is_read(tmp_path):
    net = RubiksNet("tiny", 3, num_frames=4)
    torch.save(checkpoint_of(net, config=None, classes=None, epoch=None), tmp_path / "old.ckpt")
    loaded = RubiksNet.load_pretrained(tmp_path / "old.ckpt")
    assert (loaded.classes, loaded.preprocessing, loaded.source) == (None, Preprocessing(4), {"file": "old.ckpt"})


def test_a_checkpoint_of_a_wrong_configuration_is_refused(tmp_path):
    net = RubiksNet("tiny", 3)
    torch.save(checkpoint_of(net, config={"data": {"size": "big"}}), tmp_path / "net.ckpt")
    assert_rejected(lambda: RubiksNet.load_pretrained(tmp_path / "net.ckpt"), "net.ckpt is not", "data.size", "'big'")


def test_copies_keep_what_a_network_knows(trained):
    for other in (copy.copy(trained), copy.deepcopy(trained)):
        assert other.classes == CLASSES
        assert (other.preprocessing, other.source) == (trained.preprocessing, trained.source)


def test_what_a_network_knows_is_no_part_of_its_weights(trained):
    assert trained.state_dict().keys() == RubiksNet("tiny", 3).state_dict().keys()


def test_a_new_classifier_has_no_class_names(trained):
    preprocessing = trained.preprocessing
    trained.replace_classifier(3)
    assert trained.classes is None
    assert trained.preprocessing == preprocessing


def test_preprocessing_is_checked():
    for wrong in ({"num_frames": 0}, {"num_frames": 8, "size": 0}, {"num_frames": 8, "sampling": "random"}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            Preprocessing(**wrong)
