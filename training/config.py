"""The `training` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from core.config import Section
from core.precision import Precision
from training import checkpoint
from training.compilation import Mode
from training.divergence import DivergenceConfig
from training.state import OptimizerConfig


class Config(Section):
    """The `training` section of a recipe."""

    renamed: ClassVar[Mapping[str, str]] = {"readings_every_kimg": "stats_every_kimg"}

    duration_kimg: float = Field(default=5000, gt=0)
    """Length of the run, in thousands of student images."""
    batch_size: int = Field(default=128, ge=1)
    """Images of one update, over all processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Images a process puts through the networks at a time; null: its whole share of the batch."""
    seed: int = Field(default=0, ge=0)
    """Every random number of the training follows from it."""
    student_lr: float = Field(default=1e-5, gt=0)
    """Learning rate of the student."""
    score_lr: float = Field(default=1e-5, gt=0)
    """Learning rate of the score network."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer of both."""
    warmup_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images over which both learning rates rise from 0."""
    anneal_kimg: float = Field(default=0.0, ge=0)
    """Thousands of images at the end over which both learning rates fall to 0."""
    precision: Precision = "float32"
    """Precision of the networks while training; weights and evaluations stay float32. bfloat16
    is faster if the device has it; float16 is for GPUs without it, and scales its losses; tf32
    is for GPUs. StyleGANs lower features of 16x16 and more.
    """
    compile: Mode | None = None
    """Compile networks for training with this mode of torch.compile: minutes at the start, for
    faster rounds. reduce-overhead and max-autotune replay CUDA graphs. null: do not.
    """
    shard: tuple[Literal["student", "score", "teacher"], ...] = ()
    """Networks whose weights are spread over the processes (FSDP2) and not repeated on each: those
    too large for one GPU. A StyleGAN cannot be.
    """
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest norm of an update's gradient; longer ones are scaled down to it. null: no limit."""
    ema_halflife_kimg: float = Field(default=500.0, ge=0)
    """Half-life of the student's moving average, in thousands of images; 0: no averaging."""
    ema_rampup: float | None = Field(default=0.05, gt=0)
    """The half-life is at most this times the images seen; null: no such limit."""
    stats_every_kimg: float = Field(default=1.0, gt=0)
    """Thousands of images between rows of stats in stats.jsonl."""
    checkpoint_every_kimg: float = Field(default=500.0, ge=0)
    """Thousands of images between checkpoints; 0: only at the end or when stopped."""
    keep: checkpoint.Retention = checkpoint.Retention()
    """Checkpoints that stay when a new one is written."""
    divergence: DivergenceConfig = DivergenceConfig()
    """Criteria of divergence, and the reaction to it."""
    watch: str | None = Field(default=None, min_length=1)
    """The metric, measured while training, that tells divergence, early stop and the best weights.
    null: the first of evaluation.metrics.
    """
    export: Literal["best", "last"] = "best"
    """The refined weights: those that were best by the watched metric, or the last ones."""
    refined_pickle: Literal["G_ema and G", "G_ema"] = "G_ema and G"
    """Networks of the user's pickle that get the refined weights, which are averaged ones. G_ema:
    G stays as it is, for whoever resumes the GAN's own training with it and its D.
    """
    early_stop_kimg: float | None = Field(default=None, gt=0)
    """The run ends once the watched metric has not improved for
    so many thousand images. null: it goes to its end.
    """
    tensorboard: bool = False
    """Write stats, evaluations and sample grids to RUN/tensorboard too."""

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Config:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} exceeds batch_size {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _compile_excludes_shard(self) -> Config:
        if self.compile is not None and self.shard:
            raise ValueError("compile and shard cannot be combined: leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_sharded_optimizer(self) -> Config:
        if self.optimizer.name == "Adafactor" and {"student", "score"} & set(self.shard):
            raise ValueError(
                "shard: Adafactor needs whole matrices: take Adam, or shard the teacher alone"
            )
        return self

    @property
    def total_images(self) -> int:
        """Return the length of the run in images."""
        return round(self.duration_kimg * 1000)
