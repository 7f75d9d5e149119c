"""Training and validation of RubiksNet as a LightningModule."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from rubiks.errors import InputError
from rubiks.models import RubiksNet, shifts
from rubiks.models.checkpoint import META_KEY
from rubiks.models.scoring import Mean, score_videos
from rubiks.nn import Normalize
from rubiks.training import averaging, optim
from rubiks.training.aq import Annealing, AttentionSchedule
from rubiks.training.checkpointing import forget_best
from rubiks.training.metrics import WeightedMean, accuracies
from rubiks.training.mixing import Mixing, draw_seed
from rubiks.training.position import Epoch, Position, epoch_of, write_loops
from rubiks.training.recipe import Recipe

log = logging.getLogger(__name__)

STATISTICS = "statistics"  # the checkpoint's key for the running statistics of each of several processes


class VideoClassifier(pl.LightningModule):
    """Trains a RubiksNet on batches of views, and validates it by the mean over a video's views.

    Args:
        net: the network.
        recipe: how to train it; None if it only scores.
        classes: class names in label order, kept in checkpoints.
        config: the whole configuration as plain data, kept in checkpoints.
        attention: how the temporal attention of an AQ network is quantised; None leaves it as it is.
        mixing: what mixes the clips of a training batch; None for nothing.
        seed: seed of what is random in a step (dropout).
        start: where training begins, with `Checkpoints`; None for Lightning's own counting.
        mean: what validation averages over a video's views, logits or probabilities.

    Attributes:
        position: where training stands, for the checkpoint that is about to be written; `Checkpoints` sets it.
        average: the moving average of the network, which is what validation scores; None if the recipe has none.
        finite_losses: for each batch of the current optimiser step, whether its loss is finite; None unless
            `SkipNonFinite` asks for it.
    """

    def __init__(
        self,
        net: RubiksNet,
        recipe: Recipe | None = None,
        classes: list[str] | None = None,
        config: dict[str, Any] | None = None,
        attention: AttentionSchedule | None = None,
        mixing: Mixing | None = None,
        seed: int = 0,
        start: Position | None = None,
        mean: Mean = "logits",
    ) -> None:
        super().__init__()
        self.net = net
        self._recipe = recipe
        self.classes = classes
        self.config = config or {}
        averages = recipe is not None and recipe.ema_decay is not None
        self.average = averaging.begin(net) if averages else None
        self.annealing = None if attention is None else Annealing(net, attention)
        self.mixing = mixing
        self.seed = seed
        self.mean: Mean = mean
        self.start = start
        self.position = start
        self.finite_losses: list[Tensor] | None = None
        # This process's running statistics: those from a checkpoint, and those set aside during a validation.
        self._restored_statistics: Tensor | None = None
        self._own_statistics: Tensor | None = None
        self.initial_shifts = shifts.offsets(net)
        self.normalize = Normalize()
        accuracy = accuracies(net.num_classes)
        self.train_accuracy = accuracy.clone(prefix="train/")
        self.val_accuracy = accuracy.clone(prefix="val/")
        self.train_loss = WeightedMean()
        self.val_loss = WeightedMean()  # Lightning's mean is wrong if processes have different numbers of videos

    @property
    def recipe(self) -> Recipe:
        assert self._recipe is not None, "training needs a recipe"
        return self._recipe

    @property
    def scored(self) -> RubiksNet:
        """The network that validation scores."""
        return self.net if self.average is None else self.average

    def forward(self, views: Tensor) -> Tensor:
        """Score videos: views uint8 (B, V, T, 3, H, W) -> logits (B, num_classes)."""
        return score_videos(self.scored, self.normalize, views, self.mean)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        # Every view becomes a clip with its label: the first views of all videos, then the second ones, so that clips
        # are mixed with those of other videos.
        clips = self.normalize(batch["views"].transpose(0, 1).flatten(0, 1))
        label = batch["label"].T.flatten()
        target = label
        key = self.global_step, batch_index, self.global_rank
        if self.mixing is not None:
            clips, target = self.mixing(clips, label, key)
            label = target.argmax(1)  # accuracy counts the larger share
        if self.recipe.dropout:  # so that a resumed run drops the same
            torch.manual_seed(draw_seed(self.seed, *key))
        logits = self.net(clips).float()
        loss = F.cross_entropy(logits, target, label_smoothing=self.recipe.label_smoothing)
        self.train_accuracy.update(logits.detach(), label)
        finite = loss.detach().isfinite()
        if self.finite_losses is not None:
            self.finite_losses.append(finite)
        # Without the losses of steps that are skipped.
        self.train_loss.update(loss.detach().where(finite, 0.0), finite * float(len(label)))
        self.log("train/loss_step", loss)
        return loss if self.annealing is None else loss + self._attention_penalty(self.annealing)

    def _attention_penalty(self, annealing: Annealing) -> Tensor:
        penalty = annealing.penalty()
        self.log("aq/temperature", torch.tensor(annealing.temperature))
        self.log("aq/expected_share", (annealing.share * annealing.channels).sum())
        self.log("aq/multiplier", (annealing.multiplier * annealing.channels).sum())
        return penalty

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        if not len(batch["label"]):  # no video of the batch could be read
            return
        label = batch["label"][:, 0]  # the same in all views of a video
        logits = self(batch["views"])
        self.val_accuracy.update(logits, label)
        self.val_loss.update(F.cross_entropy(logits, label), len(label))
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_accuracy)

    # ---- optimisation

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        processes = self.trainer.world_size
        groups = optim.parameter_groups(self.net, self.recipe, self.recipe.scaled_lr(processes))
        # A fused optimiser would undo the scaling of 16-mixed itself, after the gradients have been normalised.
        optimizer = optim.optimizer(groups, self.recipe, fused=self.trainer.scaler is None)
        self.shifts = optim.shift_parameters(self.net)
        self.trainer.fit_loop.setup_data()  # makes the loader, so that the number of batches is known
        self.steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        self.steps = self.steps_per_epoch * self.recipe.epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.lr_factor(self.recipe, self.steps_per_epoch))
        self._settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def schedule(self) -> torch.optim.lr_scheduler.LambdaLR:
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        return schedule

    @property
    def epoch(self) -> Epoch:
        """How epochs are currently divided into batches and steps."""
        return epoch_of(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Once per step, on the gradient summed over batches and processes, so one GPU and eight take the same step.
        optim.normalize_shifts(self.shifts)
        if self.annealing is not None:
            self.annealing.end_step(self.steps)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        step = self.trainer.global_step  # before this one
        super().optimizer_step(*arguments, **options)
        self.net.hold_back()
        if self.average is not None and self.recipe.ema_decay is not None:
            averaging.update(self.average, self.net, self.recipe.ema_decay, step)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Normalised shift gradients have length 1 per channel: thousands of them would use up the limit on their own.
        limit = self.recipe.clip_grad_norm
        if limit:
            shifts = {id(parameter) for parameter in self.shifts}
            others = [parameter for parameter in self.net.parameters() if id(parameter) not in shifts]
            self.log("train/grad_norm", nn.utils.clip_grad_norm_(others, limit))

    def on_train_start(self) -> None:
        if self.start is not None and self.start.steps:
            # The checkpoint has restored the settings that the run had before.
            done = self.epoch.scheduled_steps(self.start)
            optim.change_settings(self.trainer.optimizers[0], self.schedule, self._settings, done)
        if self._restored_statistics is not None:  # the strategy has given all processes the statistics of the first
            optim.write_flat(self._restored_statistics.to(self.device), optim.running_statistics(self.net))
            self._restored_statistics = None
        share = self.net.temporal_share()
        if self.annealing is None or share is None:
            return
        budget = self.annealing.schedule.budget
        if share > budget:
            raise InputError(
                f"aq.budget={budget:g}, but the initial network shifts {share:.2%} of its channels in time, and this "
                "choice is frozen: raise the budget, or start from a network with soft attention"
            )
        self._tell_moves()

    def _tell_moves(self) -> None:
        if self.trainer.is_global_zero:
            log.info("%s", shifts.describe_moves(self.net))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_index: int) -> None:
        # As a tensor on the CPU: a number would be copied to the GPU, and each copy waits for all work on the GPU.
        self.log("train/lr", torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"]))
        if self.annealing is not None and self.annealing.begin_step(self.schedule.last_epoch, self.steps):
            forget_best(self.trainer)  # only networks within the budget count
            if self.average is not None:
                averaging.take_choice(self.average, self.net)
            self._tell_moves()

    def on_train_epoch_end(self) -> None:
        if self.train_loss.update_called:  # not in a run resumed at an epoch's validation
            self.log_dict(self.train_accuracy)
            self.log("train/loss_epoch", self.train_loss)
        if self.annealing is not None:
            # Channels that attend most to another frame; in the hard phase, those that are shifted.
            for stage, counts in shifts.moves(self.net).items():
                self.log(f"aq/shifted/{stage}", 1 - counts.stay / sum(counts), sync_dist=True)

    def on_validation_start(self) -> None:
        # Each process has its own running statistics; all validate with those of the first, which best.ckpt holds.
        if self.trainer.world_size > 1:
            self._own_statistics = optim.flat(optim.running_statistics(self.scored))
            for buffer in self.scored.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def on_validation_end(self) -> None:
        # Training continues with its own statistics, so that it does not depend on when it is validated.
        if self._own_statistics is not None:
            optim.write_flat(self._own_statistics, optim.running_statistics(self.scored))
            self._own_statistics = None

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[META_KEY] = {
            "tier": self.net.tier,
            "variant": self.net.variant,
            "causal": self.net.causal,
            "num_classes": self.net.num_classes,
            "num_frames": self.net.num_frames,
            "classes": self.classes,
            "config": self.config,
            "epoch": self.trainer.current_epoch + 1 if self.position is None else self.position.begun_epochs,
            "position": None if self.position is None else dataclasses.asdict(self.position),
            "initial_shifts": self.initial_shifts,
        }
        if self.trainer.world_size > 1:  # each process has its own running statistics until the next validation
            own = optim.flat(optim.running_statistics(self.net))
            gathered = [torch.empty_like(own) for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather(gathered, own)
            checkpoint[STATISTICS] = [statistics.cpu() for statistics in gathered]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.initial_shifts = checkpoint[META_KEY].get("initial_shifts", {})
        averaging.fit_state(checkpoint["state_dict"], wanted=self.average is not None)
        checkpoint["callbacks"].pop("Timer", None)  # trainer.max_time counts from each start
        if self.start is not None:
            write_loops(checkpoint["loops"], self.start, self.epoch.batches_of(self.start))
        saved = checkpoint.get(STATISTICS)
        if saved is not None:
            same = len(saved) == self.trainer.world_size
            self._restored_statistics = saved[self.global_rank] if same else torch.stack(saved).mean(0)
