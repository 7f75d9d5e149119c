"""RubiksNet: four tiers, two variants and their ablations (Fan et al., ECCV 2020)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rubiks.errors import InputError
from rubiks.files import write_atomically
from rubiks.models import checkpoint, saved_folder, training_path
from rubiks.models.backbone import Backbone
from rubiks.models.clips import as_clips
from rubiks.models.cuda_graphs import Recorder
from rubiks.models.inference_cpu import InferenceNet
from rubiks.models.inference_cuda import CudaInferenceNet
from rubiks.models.preprocessing import Preprocessing
from rubiks.models.stream import FrameStream
from rubiks.models.tiers import TIERS, VARIANTS
from rubiks.nn import AttentionShift, ChannelShift
from rubiks.nn.attention import harden

OFFICIAL = (".pth.tar", ".pth", ".pt", ".ckpt")  # the endings of files in the official format
STRIDE = 32  # of the whole network: S pixels a side become ceil(S / 32)


class RubiksNet(nn.Module):
    """Video classifier whose only spatio-temporal operation is a learnable shift (RubiksNet, ECCV 2020).

    Args:
        tier: tiny, small, medium or large.
        num_classes: of the classifier, at least 1.
        variant: rubiks3d (learned 3D shift) or rubiks3d-aq (learned 2D shift and a temporal attention shift); for
            comparison rubiks3d-quantized (whole-number 3D shift), rubiks2d (no temporal shift), fixed-tsm (TSM's
            temporal shift) and grouped (nothing learned: ShiftNet's spatial and TSM's temporal shift).
        num_frames: frames per clip that the network is meant for, kept in its files. The network takes any number.
        dropout: share of features dropped before the classifier in training.
        causal: no shift reads a later frame, so that `stream` can classify frame by frame. Offsets in time above 0
            become 0, at the start, in whatever is loaded, and at each `hold_back`.

    Attributes:
        classes: class names in label order; None if they are not known.
        preprocessing: the input that the network is meant for.
        source: where the network comes from, as far as it is known: `rubiks.models.source.Source` as a dictionary.
        recorder: of training steps as CUDA graphs; `recorder.enabled = False` switches them off.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        tier: str,
        num_classes: int,
        variant: str = "rubiks3d",
        num_frames: int = 8,
        dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        for key, value, choices in (("tier", tier, TIERS), ("variant", variant, VARIANTS)):
            if value not in choices:
                raise ValueError(f"{key} must be one of {', '.join(choices)}; got {value!r}")
        for key, number in (("num_classes", num_classes), ("num_frames", num_frames)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{key} must be a whole number of at least 1, got {number!r}")
        self.tier = tier
        self.variant = variant
        self.causal = causal
        self.classes: list[str] | None = None
        self.preprocessing = Preprocessing(num_frames)
        self.source: dict[str, Any] = {}
        self.backbone = Backbone(TIERS[tier], VARIANTS[variant])
        self.dropout = nn.Dropout(dropout)
        self.new_fc = nn.Linear(self.backbone.bn_last.num_features, num_classes)
        self.recorder = Recorder()
        self._initialise()
        for shift in self.attention_shifts():
            shift.causal = causal
        self.hold_back()
        self.register_load_state_dict_post_hook(_hold_back)

    @property
    def num_classes(self) -> int:
        return self.new_fc.out_features

    @property
    def num_frames(self) -> int:
        """Frames per clip that the network is meant for."""
        return self.preprocessing.num_frames

    def _initialise(self) -> None:
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._initialise_classifier()

    def _initialise_classifier(self) -> None:
        nn.init.normal_(self.new_fc.weight, std=0.01)
        nn.init.zeros_(self.new_fc.bias)

    def forward(self, clips: Tensor) -> Tensor:
        """Classify clips.

        Args:
            clips: (N, T, 3, H, W), or the official (N, T*3, H, W), frame-major; float RGB in [0, 1] normalised by the
                ImageNet mean and standard deviation (`rubiks.nn.Normalize`); any T, H and W.

        Returns:
            logits (N, num_classes), the mean over the frames.
        """
        clips = as_clips(clips)
        batch, frames = clips.shape[:2]
        features = self._features(clips.flatten(0, 1), frames)
        return self.new_fc(self.dropout(features)).unflatten(0, (batch, frames)).mean(1)

    def _features(self, images: Tensor, frames: int) -> Tensor:
        """(N*T, 3, H, W), clip after clip -> (N*T, C), by the training path if it can be used, else by the modules."""
        if training_path.serves(self.backbone, images, frames):
            replica = getattr(self, "_is_replica", False)  # of DataParallel, whose threads share the recorder
            return training_path.features(self.backbone, images, frames, None if replica else self.recorder)
        self.recorder.forget()  # the modules need more memory
        return self.backbone(images, frames)

    def train(self, mode: bool = True) -> RubiksNet:
        if mode:
            self._forget_score()  # the weights may change
        else:  # evaluation may need the memory
            self.recorder.forget()
        return super().train(mode)

    def _forget_score(self) -> None:
        self.source = {key: value for key, value in self.source.items() if key != "evaluation"}

    def _apply(self, fn, recurse=True):
        self.recorder.forget()  # the parameters may move
        return super()._apply(fn, recurse)

    def replace_classifier(self, num_classes: int) -> RubiksNet:
        """Put in a freshly initialised classifier for another set of classes; returns the network itself.

        `classes` becomes None, since the new classes' names are not known here.
        """
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be a whole number of at least 1, got {num_classes!r}")
        old = self.new_fc
        self.new_fc = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
        self._initialise_classifier()
        self.classes = None
        self._forget_score()
        return self

    @torch.no_grad()
    def hold_back(self) -> None:
        """Set the offsets in time that are above 0 to 0, if the network is causal; call it after each optimiser step.

        At 0 an offset still has a gradient (the mean of the two one-sided derivatives), so it can fall again.
        """
        if self.causal:
            rows = [row for block in self.backbone.blocks() if (row := block.shift.time_offsets()) is not None]
            if rows:
                torch._foreach_clamp_max_(rows, 0.0)

    def attention_shifts(self) -> list[AttentionShift]:
        """Those of the AQ variant, in order from the stem; none otherwise."""
        return [module for module in self.modules() if isinstance(module, AttentionShift)]

    def harden(self, budget: float, per_layer: bool = False) -> RubiksNet:
        """Turn the temporal attention into whole-frame shifts, which cost nothing; returns the network itself.

        Each channel shifts to where its attention is largest, but at most floor(budget * channels) of the network's
        channels do: those whose attention is most off "stay". All others stay. The choice is no longer trained.

        Args:
            budget: share of the channels that may be shifted in time, 0 to 1.
            per_layer: the budget holds for each block on its own rather than for the whole network.

        Raises:
            ValueError: the network has no temporal attention, or the budget is out of range.
        """
        shifts = self.attention_shifts()
        if not shifts:
            raise ValueError(f"a network of variant {self.variant} has no temporal attention; only rubiks3d-aq has")
        if not 0 <= budget <= 1:
            raise ValueError(f"budget must be a number from 0 to 1, got {budget!r}")
        harden(shifts, budget, per_layer)
        self._forget_score()
        return self

    def temporal_share(self) -> float | None:
        """Share of the channels that whole-frame shifts move in time; None where the temporal attention is soft."""
        shifts = self.attention_shifts()
        if not shifts or not all(shift.hard for shift in shifts):
            return None
        moved = sum(len(channels) for shift in shifts for channels in (shift.back, shift.ahead) if channels is not None)
        return moved / sum(len(shift.weight) for shift in shifts)

    def optimize_for_inference(self, dtype: torch.dtype | None = None) -> InferenceNet | CudaInferenceNet:
        """A module that computes the logits of evaluation mode faster, for the device that the network is on.

        It takes the same input as the network. It has a copy of the current weights and no gradient, and uses the
        running statistics whatever the network's mode; the network is not changed. The logits differ by rounding.

        Args:
            dtype: to compute in, that of the weights by default. On a GPU bfloat16 is by far the fastest.
        """
        dtype = dtype or self.new_fc.weight.dtype
        if self.new_fc.weight.is_cuda:
            return CudaInferenceNet(self.backbone, self.new_fc, dtype)
        return InferenceNet(self.backbone, self.new_fc).to(dtype)

    def stream(self) -> FrameStream:
        """Classify frame by frame, with a copy of the current weights in evaluation mode, where the network is.

        Raises:
            ValueError: a shift reads a later frame.
        """
        return FrameStream(self.backbone, self.new_fc)

    @classmethod
    def load_pretrained(cls, path: str | os.PathLike) -> RubiksNet:
        """Read a network from what `save_pretrained` writes, or from a run.

        Args:
            path: a saved folder, an official file (``ssv2_tiny.pth.tar``, ...), a checkpoint of ours, or a run's
                folder, of which the best checkpoint is read.

        Returns the network on the CPU in evaluation mode. Only tensors, numbers and strings are read, so a file from a
        stranger cannot run code.

        Raises:
            rubiks.errors.InputError: the file or folder is missing, damaged, or not of a RubiksNet.
        """
        return cls.from_saved(checkpoint.read(path))

    @classmethod
    def from_saved(cls, saved: checkpoint.SavedNetwork) -> RubiksNet:
        """The network of a checkpoint that has been read, in evaluation mode."""
        num_frames = saved.preprocessing.num_frames
        net = cls(saved.tier, saved.num_classes, saved.variant, num_frames, causal=saved.causal)
        checkpoint.load_weights(net, saved)
        net.classes = None if saved.classes is None else list(saved.classes)
        net.preprocessing = saved.preprocessing
        net.source = saved.source.model_dump(exclude_none=True)
        return net.eval()

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the network, completely or not at all; `load_pretrained` reads it again, with the same logits.

        Args:
            path: a folder, which gets config.json, model.safetensors and a model card, README.md; a saved network in it
                is replaced, any other content refused. Or a file that ends in .pth.tar, .pth, .pt or .ckpt, in the
                official format, which has neither class names nor preprocessing.

        Raises:
            rubiks.errors.InputError: it cannot be written, or `classes` does not name every class.
        """
        path = Path(path)
        if path.name.endswith(OFFICIAL):
            self._save_official(path)
            return
        if path.suffix in (".tar", ".safetensors"):
            raise InputError(f"{path} has the name of a file; give a folder, or a name that ends in .pth.tar")
        config = saved_folder.describe(
            tier=self.tier,
            variant=self.variant,
            causal=self.causal,
            num_classes=self.num_classes,
            classes=self.classes,
            preprocessing=self.preprocessing,
            temporal_attention=self._attention_facts(),
            source=self.source,
        )
        saved_folder.write(path, config, self.state_dict(), sum(p.numel() for p in self.parameters()))

    def _save_official(self, path: Path) -> None:
        content = {
            "tier": self.tier,
            "num_classes": self.num_classes,
            "num_frames": self.num_frames,
            "variant": self.variant,
            "model": self.state_dict(),
        }
        if self.causal:  # official files do not have this key
            content["causal"] = True

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                torch.save(content, file)

        write_atomically(path, write)

    def _attention_facts(self) -> dict[str, Any] | None:
        shifts = self.attention_shifts()
        if not shifts:
            return None
        share = self.temporal_share()
        temperature = max(shift.T.item() for shift in shifts)
        return {"hard": share is not None, "temperature": temperature, "share": share}

    def __repr__(self) -> str:
        head = (
            f"tier={self.tier!r}, num_classes={self.num_classes}, variant={self.variant!r}, "
            f"num_frames={self.num_frames}{', causal=True' * self.causal}"
        )
        lines = [f"RubiksNet({head})", f"  stem    3 -> {self.backbone.conv1.out_channels}, 3x3 convolution, stride 2"]
        for stage, blocks in enumerate(self.backbone.stages()):
            channels = f"{blocks[0].bn1.num_features} -> {blocks[0].conv3.out_channels}"
            stride = blocks[0].shift.stride
            lines.append(f"  layer{stage}  {channels}, {len(blocks)} block{'s'[: len(blocks) > 1]}, stride {stride}")
        lines.append(f"  new_fc  {self.new_fc.in_features} -> {self.num_classes}, mean over frames")
        extras = ", squeeze-excite" if TIERS[self.tier].reduction else ""
        shifted = sum(m.shift.shape[1] for m in self.modules() if isinstance(m, ChannelShift))
        lines.append(f"  {VARIANTS[self.variant].about} of {shifted:,} channels{extras}")
        lines.append(f"  {sum(p.numel() for p in self.parameters()):,} parameters")
        return "\n".join(lines)


def _hold_back(net: RubiksNet, _: object) -> None:
    net.hold_back()  # the weights that have been loaded may be those of a network that is not causal
