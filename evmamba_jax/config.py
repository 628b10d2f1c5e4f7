"""What a run is: typed dataclasses, written in ``configs/*.py`` and overridden by ``--config.optim.lr=1e-3``."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError


@dataclass
class Duration:
    """A length of training, counted in steps when ``steps`` is not 0, else in epochs.

    An epoch has as many steps as there are whole batches in the training split.
    """

    epochs: float = 0.0
    steps: int = 0

    def in_steps(self, steps_per_epoch: int) -> int:
        """Return the length in optimizer steps, rounded to the nearest."""
        return self.steps or round(self.epochs * steps_per_epoch)


@dataclass
class ModelConfig:
    """Which model; the number of classes and of input channels come from the data."""

    name: str = "evmamba_t"
    drop_path_rate: float = 0.1
    dtype: str = "bfloat16"  # compute type: bfloat16 or float32; parameters and recurrence are float32 either way
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of create_model
    remat: str = "none"  # what the backward pass computes again: none, block, or dots_and_scans (keeps their results)


@dataclass
class OptimConfig:
    """The optimizer, its schedule, the moving average of the weights and what is learned from it."""

    name: str = "adamw"  # or "lamb", which clips to norm 1 once more, as timm's does
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.04
    clip_norm: float = 1.0  # global norm of the gradient; 0 = no clipping

    # Warm-up, cosine, cool-down.
    lr: float = 2e-3  # peak, not scaled by the batch size
    min_lr: float = 1e-6
    warmup_lr: float = 1e-7
    warmup: Duration = field(default_factory=lambda: Duration(epochs=20))
    warmup_prefix: bool = True  # the cosine begins after the warm-up, which otherwise hides its beginning
    cooldown: Duration = field(default_factory=Duration)  # at min_lr, the last part of the run
    # When the rate changes: with every "step"; at every "epoch", one epoch late, as in DeiT's trainer; or at every
    # "warmup_epoch" and then with every step, as in EfficientVMamba's released runs.
    lr_changes: str = "warmup_epoch"

    ema_decay: float = 0.9999  # moving average of parameters and batch statistics; 0 = none
    # MESA: weight of the divergence from the averaged model's prediction, and when that begins; 0 = none.
    mesa: float = 0.0
    mesa_start: Duration = field(default_factory=Duration)


@dataclass
class MeshConfig:
    """How many devices share the batch only (``data``) and share the parameters too (``fsdp``)."""

    data: int = -1  # -1 = all that fsdp leaves
    fsdp: int = 1


@dataclass
class DistributedConfig:
    """Several processes, one or more a host; the last three are found by JAX on Cloud TPU, Slurm and the like."""

    enabled: bool = False
    coordinator_address: str = ""  # host:port of process 0
    num_processes: int = 0
    process_id: int = -1


@dataclass
class Config:
    """One run of ``train_tpu.py``."""

    task: str = "classification"  # or another file of evmamba_jax/tasks
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    seed: int = 0
    batch_size: int = 1024  # images a step over all devices and accumulation rounds
    accumulation: int = 1  # rounds of forward and backward a step
    duration: Duration = field(default_factory=lambda: Duration(epochs=300))
    log_every: Duration = field(default_factory=lambda: Duration(steps=50))
    eval_every: Duration = field(default_factory=lambda: Duration(epochs=1))  # a checkpoint follows every evaluation
    save_every: Duration = field(default_factory=lambda: Duration(epochs=1))
    keep_last: int = 3
    keep_best: int = 1
    init_from: str = ""  # start from a file of official weights, or the folder of a converted model or another run
    eval_only: bool = False  # evaluate init_from, or the newest checkpoint of the work folder
    confusion: bool = False  # with eval_only: also draw confusion.png, which classes are taken for which

    def validate(self) -> None:
        """Raise a UserError for values that no task can work with, before anything is loaded."""
        self.data.validate()
        self._one_of("model.dtype", self.model.dtype, ("bfloat16", "float32"))
        if self.batch_size < 1 or self.accumulation < 1:
            raise UserError(
                f"config.batch_size is {self.batch_size} and config.accumulation {self.accumulation}; "
                "both must be at least 1"
            )
        if not 0 <= self.optim.ema_decay < 1:
            raise UserError(f"config.optim.ema_decay is {self.optim.ema_decay}; allowed: 0 (none) up to below 1")
        self._one_of("optim.name", self.optim.name, ("adamw", "lamb"))
        self._one_of("optim.lr_changes", self.optim.lr_changes, ("step", "epoch", "warmup_epoch"))
        for name in ("duration", "log_every", "eval_every", "save_every"):
            length = getattr(self, name)
            if length.steps < 0 or length.epochs < 0 or not (length.steps or length.epochs):
                raise UserError(f"config.{name} is {length}; set steps or epochs to a positive number")

    def _one_of(self, field: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise UserError(f"config.{field} is {value!r}; allowed: {', '.join(map(repr, allowed))}")

    def to_json(self) -> str:
        """Return the resolved configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)
