"""The settings of a training recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rubiks.settings import AsTuple, Count, Expected, Settings

Rate = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, lt=1)]


class Recipe(Settings, section="recipe"):
    """A training recipe; `conf/recipe` has one file for each, with its source."""

    epochs: Count = Field(description="passes over the training list")
    batch_size: Count = Field(description="videos per batch in each process")
    lr: Rate = Field(
        description="learning rate at a total batch of lr_batch videos. It is scaled in proportion to the total batch, "
        "batch_size * accumulate * processes (Goyal et al., 2017)"
    )
    lr_batch: Count = Field(description="the total batch that lr is for")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd: without Nesterov momentum")
    accumulate: Count = Field(1, description="batches per optimiser step")
    momentum: Part = Field(0.9, description="momentum of sgd")
    weight_decay: Rate = Field(0.0, description="for convolution and linear weights; nothing else decays")
    shift_lr_scale: Rate = Field(0.01, description="learning rate of the shifts, as a multiple of lr")
    attention_lr_scale: Rate = Field(1.0, description="learning rate of the attention logits (AQ), as a multiple of lr")
    classifier_lr_scale: Rate = Field(1.0, description="learning rate of the classifier, as a multiple of lr")
    schedule: Literal["constant", "step", "cosine"] = Field(
        "step", description="step: divided by 10 after each of milestones; cosine: falls to 0"
    )
    milestones: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], AsTuple, Expected("a list of epochs, each a number above 0")
    ] = Field((), description="epochs, for schedule=step")
    warmup_epochs: Rate = Field(0.0, description="linear warm-up from 0, in epochs")
    label_smoothing: Part = Field(0.0, description="share of the label to spread over all classes")
    dropout: Part = Field(0.0, description="dropout before the classifier")
    clip_grad_norm: Rate = Field(0.0, description="largest norm of the gradient, shifts excluded; 0: no limit")
    freeze: Literal["stem", "layer0", "layer1", "layer2", "layer3", "layer4", "backbone"] | None = Field(
        None,
        description="with init=FILE: do not train the network from the input up to and including this part, named as "
        "in the printed network; backbone: train the classifier alone. Frozen batch norms keep their statistics",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1), Expected("a number above 0 and below 1")] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, per optimiser step, for example 0.9998; "
        "lower over the first steps. Validation and eval.py use the average. null: no average",
    )
    crop_scales: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        Field(min_length=1),
        AsTuple,
        Expected("a list of at least one number, each above 0 and at most 1"),
    ] = Field(
        (1.0, 0.875, 0.75, 0.66),
        description="sides of TSM's multi-scale crop, as shares of the short side; not used with "
        "augment.random_resized_crop",
    )

    def total_batch(self, processes: int) -> int:
        """Videos per optimiser step."""
        return self.batch_size * self.accumulate * processes

    def near_total_batch(self, videos: int, processes: int) -> Recipe:
        """This recipe, with the number of batches per optimiser step that comes nearest to a total batch."""
        return self.model_copy(update={"accumulate": max(1, round(videos / (self.batch_size * processes)))})

    def scaled_lr(self, processes: int) -> float:
        """The learning rate by the linear scaling rule."""
        return self.lr * self.total_batch(processes) / self.lr_batch
