"""What train.py makes of a configuration."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from rubiks import assemble, weights
from rubiks.cli.entry import plain
from rubiks.data import videos
from rubiks.experiment import Training
from rubiks.runs import Run
from rubiks.stopping import Stop


class Made:
    """What train.py makes of a configuration, each object when it is first asked for."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    @cached_property
    def settings(self) -> Training:
        return Training(**plain(self.cfg))

    @cached_property
    def source(self):
        return self.settings.data.source.ready()

    @cached_property
    def classes(self):
        return videos.class_names(self.source)

    @cached_property
    def manifest(self):
        return videos.manifest_of(self.settings.data.source)

    @cached_property
    def train(self):
        return self._records("train")

    @cached_property
    def val(self):
        return self._records("val")

    def _records(self, split):
        loading = self.settings.data.loading
        return videos.records(self.source, loading, split, len(self.classes), self.manifest)[0]

    @cached_property
    def views(self):
        return assemble.training_views(self.settings, self.classes)

    @cached_property
    def protocol(self):
        return self.settings.protocol_for(self.settings.data.sampling)

    @cached_property
    def data(self):
        return assemble.training_data(self.settings, self.train, self.val, self.views)

    @cached_property
    def net(self):
        return weights.network(self.settings, self.classes)

    @cached_property
    def mixing(self):
        return assemble.mixing(self.settings, len(self.classes))

    @cached_property
    def trainer(self) -> pl.Trainer:
        stop = Stop(timeout=self.settings.process_timeout)
        callbacks = assemble.training_callbacks(self.settings, Run(Path("outputs/x")), stop)
        return assemble.trainer(self.settings, callbacks, stop, max_epochs=3)

    def everything(self) -> None:
        """Make everything except the network, which is slow: by then every wrong value has been found."""
        _ = self.settings, self.mixing, self.val, self.data, self.trainer

    def callback(self, kind: type):
        (found,) = [callback for callback in self.trainer.callbacks if isinstance(callback, kind)]
        return found
