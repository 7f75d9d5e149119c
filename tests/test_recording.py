"""Training with CUDA graphs: the same steps, bit for bit, and the same behaviour otherwise."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_fused_gpu import NETWORKS, randn
from torch import Tensor, nn

from rubiks import RubiksNet
from rubiks.models import training_path
from rubiks.models.cuda_graphs import CALLS_BEFORE_RECORDING, CALLS_BEFORE_REPLACING
from rubiks.nn.shift import FixedTimeShift
from rubiks.training.distributed import groups, in_one_piece

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fused_kernels")]
SIZE = 48


def network(variant: str = "rubiks3d", tier: str = "tiny", graphs: bool = True) -> RubiksNet:
    torch.manual_seed(1)
    net = RubiksNet(tier, 5, variant).cuda().train()
    net.recorder.enabled = graphs
    return net


def pair(variant: str = "rubiks3d", tier: str = "tiny") -> tuple[RubiksNet, RubiksNet]:
    """The same network with graphs and without."""
    return network(variant, tier), network(variant, tier, graphs=False)


def batches(count: int, clips: int = 2) -> list[Tensor]:
    torch.manual_seed(2)
    return [randn(clips, 8, 3, SIZE, SIZE) for _ in range(count)]


def loss(net: RubiksNet, clips: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        logits = net(clips)
    return F.cross_entropy(logits, torch.arange(len(clips), device="cuda") % 5)


def recorded(net: RubiksNet) -> bool:
    return net.recorder._recording is not None


def warm(net: RubiksNet, clips: int = 2) -> None:
    """Until it is recorded."""
    for batch in batches(CALLS_BEFORE_RECORDING + 1, clips):
        loss(net, batch).backward()
    net.zero_grad()
    assert recorded(net)


def state(net: RubiksNet) -> dict[str, Tensor | None]:
    return dict(net.state_dict()) | {f"gradient of {n}": p.grad for n, p in net.named_parameters()}


def assert_same(a: RubiksNet, b: RubiksNet) -> None:
    ours, theirs = state(a), state(b)
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        assert value is None or torch.equal(value, other), name


@pytest.mark.parametrize(
    ("tier", "variant", "freeze"),
    [(*network, None) for network in NETWORKS] + [(*NETWORKS[1], last) for last in ("stem", "layer1")],
)
def test_steps_are_the_same(tier, variant, freeze):
    nets = pair(variant, tier)
    for net in nets:
        if freeze is not None:
            net.backbone.freeze(freeze)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for batch in batches(CALLS_BEFORE_RECORDING + 4):
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()
    assert recorded(nets[0])
    assert not recorded(nets[1])
    assert_same(*nets)


def test_gradients_add_up_and_are_not_overwritten():
    nets = pair()
    for net in nets:
        for batch in batches(CALLS_BEFORE_RECORDING + 3):
            loss(net, batch).backward()  # never set to zero
    assert_same(*nets)
    warm(nets[0])
    first, second = batches(2)
    loss(nets[0], first).backward()
    kept = [p.grad for p in nets[0].parameters()]
    before = [g.clone() for g in kept]
    nets[0].zero_grad(set_to_none=True)
    loss(nets[0], second).backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_forwards_before_their_backwards():
    nets = pair()
    for net in nets:
        for batch in batches(CALLS_BEFORE_RECORDING + 1):
            loss(net, batch).backward()
        losses = [loss(net, batch) for batch in batches(3)]
        for value in losses:
            value.backward()
        loss(net, batches(1)[0])  # whose backward never runs
        sum(loss(net, batch) for batch in batches(2)).backward()
        loss(net, batches(1)[0]).backward()
    assert recorded(nets[0])
    assert_same(*nets)


@pytest.mark.parametrize("forward_between", [False, True])
def test_backward_twice_is_an_error(forward_between):
    net = network()
    warm(net)
    first, second = batches(2)
    value = loss(net, first)
    value.backward(retain_graph=True)
    if forward_between:
        loss(net, second).backward()
    with pytest.raises(RuntimeError, match=r"recorder\.enabled = False"):
        value.backward()


def test_a_parameter_changed_before_the_backward_is_an_error():
    net = network()
    warm(net)
    value = loss(net, batches(1)[0])
    with torch.no_grad():
        net.backbone.layer1[0].conv3.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_other_batches_in_between():
    nets = pair()
    for net in nets:
        for batch in (
            *batches(CALLS_BEFORE_RECORDING + 1),
            *batches(1, clips=1),
            *batches(1),
            *batches(CALLS_BEFORE_RECORDING + 2, clips=3),
            *batches(2),
        ):
            loss(net, batch).backward()
    assert_same(*nets)


@pytest.mark.parametrize("change", ["momentum", "frozen", "moved", "storage", "attention"])
def test_what_changes_on_the_way(change):
    variant = "rubiks3d-aq" if change == "attention" else "rubiks3d"
    nets = pair(variant)
    for net in nets:
        for batch in batches(CALLS_BEFORE_RECORDING + 2):
            loss(net, batch).backward()
        block = net.backbone.layer2[0]
        if change == "momentum":
            block.bn1.momentum = 0.5
        elif change == "frozen":
            block.conv3.requires_grad_(False)
            net.zero_grad()
        elif change == "moved":
            net.cpu().cuda()
        elif change == "storage":
            block.conv3.weight.data = 2 * block.conv3.weight.data
        else:
            net.harden(0.25)
        before = net.recorder._recording
        for batch in batches(CALLS_BEFORE_REPLACING + 2):
            loss(net, batch).backward()
        same = change in ("frozen", "attention")  # the graphs read none of this
        assert (net.recorder._recording is before) == (same or net is nets[1])
    assert_same(*nets)


def test_evaluation_frees_the_memory():
    net = network()
    warm(net, clips=32)
    torch.cuda.empty_cache()
    with_graphs = torch.cuda.memory_reserved()
    net.eval()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < with_graphs - 5e7
    net.train()
    warm(net)


def test_too_little_memory(monkeypatch, caplog):
    nets = pair()
    for net in nets:
        for batch in batches(CALLS_BEFORE_RECORDING):
            loss(net, batch).backward()

    def fail(gx, columns):
        torch.empty(2**50, device="cuda")

    with monkeypatch.context() as patch:
        patch.setattr(training_path, "stem_weight_grad", fail)  # at the end of the recording
        value = loss(nets[0], batches(1)[0])
    value.backward()
    assert "Continuing without CUDA graphs" in caplog.text
    for net in nets:
        for batch in batches(CALLS_BEFORE_RECORDING + 2)[net is nets[0] :]:
            loss(net, batch).backward()
    assert not recorded(nets[0])
    assert_same(*nets)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_begin_anew(again):
    net = network()
    warm(net)
    other = again(net)
    assert recorded(net)
    assert not recorded(other)
    for batch in batches(CALLS_BEFORE_RECORDING + 1):
        loss(other, batch).backward()
        loss(net, batch).backward()
    assert_same(net, other)


def test_bfloat16_parameters():
    nets = tuple(net.bfloat16() for net in pair())
    for net, batch in itertools.product(nets, batches(CALLS_BEFORE_RECORDING + 2)):
        F.cross_entropy(net(batch.bfloat16()).float(), torch.tensor([0, 1], device="cuda")).backward()
    assert recorded(nets[0])
    assert_same(*nets)


def test_distributed(tmp_path):
    nets = pair()
    torch.distributed.init_process_group("nccl", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for net in nets:
            wrapped = nn.parallel.DistributedDataParallel(net, device_ids=[0])
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            for first, second in zip(*2 * [iter(batches(2 * CALLS_BEFORE_RECORDING + 6))], strict=True):
                optimizer.zero_grad()
                with wrapped.no_sync():
                    loss(wrapped, first).backward()
                loss(wrapped, second).backward()
                optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert recorded(nets[0])
    assert_same(*nets)


@pytest.mark.parametrize(("tier", "variant"), NETWORKS)
def test_the_gradients_of_a_recording_can_be_averaged_in_one_piece(tier, variant):
    net = network(variant, tier)
    warm(net)
    loss(net, batches(1)[0]).backward()
    together, others = groups(net)
    assert in_one_piece([parameter.grad for parameter in together]) is not None
    apart = [*net.new_fc.parameters(), *net.backbone.bn_last.parameters()]
    apart += [shift.weight for shift in net.attention_shifts()]
    apart += [module.shift for module in net.modules() if isinstance(module, FixedTimeShift)]
    assert set(map(id, others)) == set(map(id, apart))


def test_within_a_graph_of_the_whole_step():
    net = network()
    batch = batches(1)[0]
    parameters = list(net.parameters())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(CALLS_BEFORE_RECORDING):
            expected = torch.autograd.grad(loss(net, batch), parameters)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(loss(net, batch), parameters)
    graph.replay()
    assert not recorded(net)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_last_norm_alone():
    """The trunk is frozen and in training mode, with one clip; the norm reads the trunk's result in place."""
    nets = pair()
    for net in nets:
        for name, parameter in net.backbone.named_parameters():
            parameter.requires_grad_(name.startswith("bn_last"))
        for _ in range(CALLS_BEFORE_RECORDING + 1):
            losses = [loss(net, batch) for batch in batches(2, clips=1)]
            sum(losses).backward()
    assert_same(*nets)


def test_what_a_later_forward_has_overwritten_is_an_error():
    net = network()
    warm(net, clips=1)
    first, second = batches(2, clips=1)
    value = loss(net, first)
    value.backward(retain_graph=True)
    loss(net, second)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, net.backbone.bn_last.weight)


def test_switched_off():
    net = network(graphs=False)
    for batch in batches(CALLS_BEFORE_RECORDING + 2):
        loss(net, batch).backward()
    assert not recorded(net)
    assert not copy.deepcopy(net).recorder.enabled
