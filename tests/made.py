"""What train.py makes of a configuration."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytorch_lightning as pl

from rubiks import assemble, trainers
from rubiks.runs import Run
from rubiks.stopping import Stop


class Made:
    """What train.py makes of a configuration, each object when it is first asked for."""

    def __init__(self, cfg) -> None:
        self.cfg = cfg

    @cached_property
    def recipe(self):
        return assemble.recipe(self.cfg)

    @cached_property
    def attention(self):
        return assemble.attention_schedule(self.cfg)

    @cached_property
    def augment(self):
        return assemble.augment(self.cfg)

    @cached_property
    def source(self):
        return assemble.source(self.cfg)

    @cached_property
    def classes(self):
        return assemble.class_names(self.cfg, self.source)

    @cached_property
    def manifest(self):
        return assemble.manifest(self.cfg)

    @cached_property
    def train(self):
        return assemble.records(self.cfg, self.source, "train", len(self.classes), self.manifest)[0]

    @cached_property
    def val(self):
        return assemble.records(self.cfg, self.source, "val", len(self.classes), self.manifest)[0]

    @cached_property
    def views(self):
        return assemble.training_views(self.cfg, self.classes, (0.95, 0.85))

    @cached_property
    def protocol(self):
        return assemble.protocol(self.cfg, self.views.num_frames, self.views.size, self.views.window)

    @cached_property
    def data(self):
        return assemble.datamodule(self.cfg, self.train, self.val, self.views, self.protocol, 21, 22, True)

    @cached_property
    def net(self):
        return assemble.network(self.cfg, self.classes, 0.45)

    @cached_property
    def mixing(self):
        return assemble.mixing(self.cfg, len(self.classes))

    @cached_property
    def trainer(self) -> pl.Trainer:
        stop = Stop(timeout=trainers.process_timeout(self.cfg))
        callbacks = trainers.training_callbacks(self.cfg, Run(Path("outputs/x")), stop, keep_best=True)
        return trainers.trainer(self.cfg, callbacks, stop, max_epochs=3)

    def everything(self) -> None:
        """Make all but the network, which takes long: what is wrong is found then."""
        _ = self.recipe, self.attention, self.mixing, self.val, self.data, self.trainer

    def callback(self, kind: type):
        (found,) = [callback for callback in self.trainer.callbacks if isinstance(callback, kind)]
        return found
