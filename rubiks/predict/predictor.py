"""Classifies videos with a trained network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rubiks.data.datamodule import Loading, VideoDataModule
from rubiks.data.dataset import VideoDataset
from rubiks.data.readers import Reader, check_reader
from rubiks.data.records import VideoRecord
from rubiks.errors import InputError, VideoError
from rubiks.evaluation.protocols import STANDARD, ProtocolSettings
from rubiks.evaluation.scorer import Scorer, fast_net
from rubiks.models import RubiksNet, checkpoint
from rubiks.predict import sources


@dataclass(frozen=True)
class ClassScore:
    """A class that a video may show.

    Attributes:
        label: its name; its number if the network does not know the names.
        index: its number.
        score: its probability, 0 to 1.
    """

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """What a video shows.

    Attributes:
        source: the video.
        predictions: the classes with the highest scores, highest first; none for an unreadable video.
        error: why the video cannot be read; None if it can.
    """

    source: str
    predictions: list[ClassScore]
    error: str | None = None


class Predictor:
    """A trained network that classifies videos, just as `rubiks eval` scores them.

    Args:
        path: a checkpoint, ours or official, a run's folder, or a saved network's folder.
        protocol: which views of a video are scored: one_clip, two_clip or dense_10x3, or other settings.
        topk: how many classes a prediction names.
        device: auto uses a GPU if there is one. On a GPU it computes in bfloat16.
        reader: the library that reads video files, as `data.reader`.

    Attributes:
        net: the network.
        classes: class names in label order; their numbers as text if the file does not have them.
        protocol: the views.

    Raises:
        InputError: there is no such checkpoint, or an argument is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        protocol: str | ProtocolSettings = "one_clip",
        topk: int = 5,
        device: Literal["auto", "cpu", "gpu"] = "auto",
        reader: Reader = "auto",
    ) -> None:
        if isinstance(protocol, str):
            if protocol not in STANDARD:
                raise InputError(f"protocol must be one of {', '.join(STANDARD)}; got {protocol!r}")
            protocol = STANDARD[protocol]
        if topk < 1:
            raise InputError(f"topk must be a whole number of at least 1, got {topk}")
        check_reader(reader)
        if device == "gpu" and not torch.cuda.is_available():
            raise InputError("device=gpu, but PyTorch finds no GPU; use device=cpu or install PyTorch for CUDA")
        saved = checkpoint.read(path)
        self.path = saved.path
        self.net = RubiksNet.from_saved(saved)
        self.classes = saved.classes or [str(label) for label in range(saved.num_classes)]
        trained = saved.preprocessing
        self.protocol = protocol.protocol(trained.num_frames, trained.size, trained.sampling, trained.window)
        self.topk = min(topk, saved.num_classes)
        self._reader = reader
        self._device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self._scorer = Scorer(self.net.to(self._device), self.protocol.mean).to(self._device)
        self._scorer.fast_net = fast_net(self.net, self._device, bf16=True)

    def __call__(self, video: str | os.PathLike) -> Prediction:
        """Classify one video file.

        Raises:
            VideoError: it cannot be read.
        """
        return Prediction(os.fspath(video), self.ranked(self.logits(self.views(video))))

    def views(self, video: str | os.PathLike) -> Tensor:
        """The pixels that are scored: uint8 (V, T, 3, S, S). Raises VideoError."""
        item = VideoDataset([VideoRecord(os.fspath(video), 0)], self.protocol, 0, self._reader)[0, 0, 0]
        if isinstance(item, VideoError):
            raise item
        return item["views"]

    def logits(self, views: Tensor) -> Tensor:
        """The logits (classes,) of a video's views, uint8 (V, T, 3, S, S)."""
        return self._score({"views": views[None], "index": torch.zeros(1, dtype=torch.int64)})[0]

    def many(
        self, videos: Iterable[str | os.PathLike], batch_size: int = 16, workers: int | None = None
    ) -> Iterator[Prediction]:
        """Classify videos in batches; an unreadable video gives a prediction with an error.

        Args:
            videos: files, folders, patterns and lists: see `sources.find`.
            batch_size: videos at a time.
            workers: processes that read videos; 0: this process; None: as many as there are other cores.

        Yields:
            A prediction for each video, in order.

        Raises:
            InputError: a folder, pattern or list names no video.
        """
        yield from self.records(sources.find(list(videos)), batch_size, workers)

    def records(
        self, records: Sequence[VideoRecord], batch_size: int = 16, workers: int | None = None
    ) -> Iterator[Prediction]:
        """`many` for videos that have been found."""
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value is not None and value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value}")
        loading = Loading(workers="auto" if workers is None else workers, reader=self._reader, on_error="skip")
        data = VideoDataModule([], records, self.protocol, self.protocol, batch_size, batch_size, loading)
        for number, batch in enumerate(data.predict_dataloader()):
            reasons = dict(batch["bad"])
            scores = dict(zip(batch["index"].tolist(), self._score(batch), strict=True))
            for index in range(number * batch_size, min((number + 1) * batch_size, len(records))):
                path = records[index].path
                if index in scores:
                    yield Prediction(path, self.ranked(scores[index]))
                else:
                    yield Prediction(path, [], reasons[path])

    @torch.inference_mode()
    def _score(self, batch: dict[str, Any]) -> Tensor:
        """The logits (B, classes) of a batch, on the CPU."""
        indices = batch["index"].tolist()
        if not indices:
            return torch.empty(0, len(self.classes))
        views = batch["views"].to(self._device).contiguous()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return self._scorer(views, indices)[:, 0].cpu()

    def ranked(self, logits: Tensor) -> list[ClassScore]:
        """The classes with the highest logits (classes,), highest first."""
        scores = logits.double().softmax(0)
        # Of equal scores the first class comes first, as in evaluation.
        order = torch.sort(logits, descending=True, stable=True).indices[: self.topk].tolist()
        return [ClassScore(self.classes[index], index, scores[index].item()) for index in order]
