"""What a checkpoint file must contain, and the exact message if it does not."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest
import torch

from rubiks import RubiksNet
from rubiks.errors import InputError
from rubiks.models import TIERS, VARIANTS, checkpoint

ADVICE = "Expected a checkpoint of train.py or an official .pth.tar file"


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("net") / "net.pth.tar"
    RubiksNet("tiny", 3).save_pretrained(path)
    return torch.load(path, weights_only=True)


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        RubiksNet.load_pretrained(path)
    message = str(caught.value)
    start, end = f"{path} is not a RubiksNet checkpoint: ", f". {ADVICE}"
    assert message.startswith(start)
    assert message.endswith(end)
    return message[len(start) : -len(end)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda own: dict.fromkeys("abcdefghij", 0), "its keys are a, b, c, d, e, f, g, h"),
        (lambda own: {}, "its keys are none"),
        (lambda own: {"rubiks": own}, "its keys are rubiks"),
        (lambda own: {"state_dict": own["model"]}, "its keys are state_dict"),
        (lambda own: {"rubiks": 1, "state_dict": own["model"]}, "its keys are rubiks, state_dict"),
        (lambda own: own | {"model": {}}, "its state dict is empty or contains values that are not tensors"),
        (
            lambda own: own | {"model": own["model"] | {"epoch": 3}},
            "its state dict is empty or contains values that are not tensors",
        ),
        (lambda own: own | {"tier": "huge"}, f"its tier is 'huge', expected one of {', '.join(TIERS)}"),
        (lambda own: own | {"variant": "4d"}, f"its variant is '4d', expected one of {', '.join(VARIANTS)}"),
        (lambda own: own | {"num_classes": 0}, "num_classes=0, num_frames=8"),
        (lambda own: own | {"num_frames": 0}, "num_classes=3, num_frames=0"),
        (lambda own: own | {"num_frames": -8}, "num_classes=3, num_frames=-8"),
        (
            lambda own: {key: value for key, value in own.items() if key != "num_frames"},
            "tier, variant, num_classes and num_frames cannot be read (KeyError('num_frames'))",
        ),
    ],
)
def test_what_is_wrong_is_named(change, reason, content, tmp_path):
    torch.save(change(content), tmp_path / "net.pth.tar")
    assert refusal(tmp_path / "net.pth.tar") == reason


@pytest.mark.parametrize(("classes", "frames"), [(1, 8), (3, 1)])
def test_one_class_or_frame_is_enough(classes, frames, tmp_path):
    RubiksNet("tiny", classes, num_frames=frames).save_pretrained(tmp_path / "net.pth.tar")
    net = RubiksNet.load_pretrained(tmp_path / "net.pth.tar")
    assert (net.num_classes, net.num_frames) == (classes, frames)


def zip_without_directory() -> bytes:
    """A zip file with its list of files overwritten, but with an intact end that points to it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "x")
    whole = file.getvalue()
    return whole.replace(b"PK\x01\x02", b"PK\x00\x00")


def zip_of_an_empty_pickle() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/version", b"3")
        archive.writestr("net/byteorder", b"little")
    return file.getvalue()


def torn_tar() -> bytes:
    """A tar file that ends within its second member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.size = 4000
            archive.addfile(member, io.BytesIO(bytes(4000)))
    return file.getvalue()[: 512 + 4096 + 100]


@pytest.mark.parametrize("make", [zip_without_directory, zip_of_an_empty_pickle, torn_tar])
def test_broken_archives_are_damaged(make, tmp_path):
    (tmp_path / "net.pth.tar").write_bytes(make())
    assert refusal(tmp_path / "net.pth.tar") == "it is damaged or in another format"


def test_weights_that_do_not_fit_are_listed(content, tmp_path):
    weights = dict(content["model"])
    gone = [name for name in weights if name.endswith("running_mean")]
    for name in gone:
        del weights[name]
    weights["a.b"] = torch.zeros(1)
    weights["new_fc.weight"] = torch.zeros(2, 432)
    weights["new_fc.bias"] = torch.zeros(2)
    torch.save(content | {"model": weights}, tmp_path / "net.pth.tar")
    saved = checkpoint.read(tmp_path / "net.pth.tar")
    with pytest.raises(InputError) as caught:
        checkpoint.load_weights(RubiksNet("tiny", 3), saved)
    assert str(caught.value) == (
        f"{tmp_path}/net.pth.tar does not fit tier tiny, variant rubiks3d; "
        f"missing: {', '.join(gone[:3])} and {len(gone) - 3} more; unknown: a.b; wrong shape: "
        "new_fc.weight is (2, 432), expected (3, 432), new_fc.bias is (2,), expected (3,)"
    )


def test_three_that_are_missing_are_all_named(content, tmp_path):
    gone = list(content["model"])[:3]
    weights = {name: value for name, value in content["model"].items() if name not in gone}
    torch.save(content | {"model": weights}, tmp_path / "net.pth.tar")
    with pytest.raises(InputError) as caught:
        RubiksNet.load_pretrained(tmp_path / "net.pth.tar")
    assert str(caught.value).endswith(f"; missing: {', '.join(gone)}")
