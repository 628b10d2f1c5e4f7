"""What a run is: typed dataclasses, written in ``configs/*.py`` and overridden by ``--config.optim.lr=1e-3``."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evmamba_jax import ranges
from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError
from evmamba_jax.ranges import chosen, free, place, ranged, share, stated

MOST_STEPS = 2**31 - 1  # what the int32 of a train state holds


@dataclass
class Duration:
    """A length of training, counted in steps when ``steps`` is not 0, else in epochs.

    An epoch has as many steps as there are whole batches in the training split.
    """

    epochs: float = ranged(0.0, least=0)
    steps: int = ranged(0, least=0, most=MOST_STEPS)

    def in_steps(self, steps_per_epoch: int) -> int:
        """Return the length in optimizer steps, rounded to the nearest; raises a UserError for too many to count."""
        steps = self.steps or round(self.epochs * steps_per_epoch)
        if steps > MOST_STEPS:
            raise UserError(f"{self} is longer than the {MOST_STEPS} steps that can be counted: make it shorter")
        return steps


@dataclass
class ModelConfig:
    """Which model; the number of classes and of input channels come from the data."""

    name: str = free("evmamba_t")
    drop_path_rate: float = ranged(0.1, least=0, below=1)
    # Compute type; parameters and recurrence are float32 either way.
    dtype: str = chosen("bfloat16", ("bfloat16", "float32"))
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of create_model
    # What the backward pass computes again: none, block, or dots_and_scans (keeps their results).
    remat: str = free("none")


@dataclass
class OptimConfig:
    """The optimizer, its schedule, the moving average of the weights and what is learned from it."""

    name: str = chosen("adamw", ("adamw", "lamb"))  # lamb clips to norm 1 once more, as timm's does
    betas: tuple[float, float] = ranged((0.9, 0.999), least=0, below=1)
    eps: float = ranged(1e-8, above=0)
    weight_decay: float = ranged(0.04, least=0)
    # What weight decay spares: "vectors", which are biases and what else has one axis in the official code;
    # "norm_names", as mmdet and mmseg have it, parameters with "norm" in their official names alone; "positions", the
    # position embedding alone; or "nothing".
    no_decay: str = chosen("vectors", ("vectors", "norm_names", "positions", "nothing"))
    clip_norm: float = ranged(1.0, least=0)  # global norm of the gradient; 0 = no clipping

    # Warm-up, then the schedule, cool-down.
    lr: float = ranged(2e-3, above=0)  # peak, not scaled by the batch size
    # From lr to min_lr along a "cosine" or, as "poly", a line; or from lr to a tenth after each of the "milestones".
    schedule: str = chosen("cosine", ("cosine", "poly", "milestones"))
    milestones: tuple[float, ...] = ranged((), above=0)  # epochs from the beginning of the run
    min_lr: float = ranged(1e-6, least=0)
    warmup_lr: float = ranged(1e-7, least=0)
    warmup: Duration = field(default_factory=lambda: Duration(epochs=20))
    # Cosine and poly begin after the warm-up, which otherwise hides the cosine's beginning and scales the poly's.
    warmup_prefix: bool = True
    cooldown: Duration = field(default_factory=Duration)  # at min_lr, the last part of the run; not with milestones
    # When the rate changes: with every "step"; at every "epoch", one epoch late, as in DeiT's trainer; or at every
    # "warmup_epoch" and then with every step, as in EfficientVMamba's released runs.
    lr_changes: str = chosen("warmup_epoch", ("step", "epoch", "warmup_epoch"))

    # Moving average of parameters and batch statistics.
    ema_decay: float = ranged(0.9999, least=0, below=1, words="0 (none) up to below 1")
    ema_warmup: bool = False  # after t steps at most (1 + t) / (10 + t), so that it follows a short run
    # MESA: weight of the divergence from the averaged model's prediction, and when that begins; 0 = none.
    mesa: float = ranged(0.0, least=0)
    mesa_start: Duration = field(default_factory=Duration)


@dataclass
class LossConfig:
    """What a classification minimises."""

    # Of softmax, or "bce": binary cross-entropy of each class by itself, the mean over classes.
    name: str = chosen("cross_entropy", ("cross_entropy", "bce"))
    class_weights: tuple[float, ...] = ranged((), above=0)  # factors of the loss by class, in label order; none: all 1
    # Factors that make all classes count the same: images / (classes * images of the class), in the training split.
    balanced: bool = False


@dataclass
class TuneConfig:
    """What of a model is trained, and how fast each part; all of it at one rate unless said otherwise.

    Patterns are of parameter paths, as the shell has them: ``--config.tune.freeze="patch_embed.*,stages.0.*"``.
    """

    # "full"; the "head" alone, as a linear probe; or the head and low-rank additions to the linear layers ("lora").
    method: str = chosen("full", ("full", "head", "lora"))
    freeze: tuple[str, ...] = free(())  # these stay as they are, whatever the method
    layer_decay: float = ranged(1.0, above=0, most=1)  # factor of the learning rate, once more for each layer down
    head_lr: float = ranged(1.0, above=0)  # factor of the head's learning rate
    embed_lr: float = ranged(1.0, above=0)  # the same of the patch and position embeddings', and the class token's
    lora_rank: int = ranged(8, least=1)
    lora_alpha: float = ranged(16.0, above=0)  # the additions are scaled by alpha / rank
    lora_targets: tuple[str, ...] = free(("*",))  # which linear layers get them


@dataclass
class PruningConfig:
    """Which weights become zero, and when: masks are drawn at some steps and kept at all others."""

    # "gradual": more and more from begin to end; "one_shot": all at begin; "early_bird": all once the masks that would
    # be drawn no longer move; "keep": what is zero in init_from stays so; "imp", iterative magnitude pruning: a run a
    # level, each from an early state of the first with fewer weights. Empty: nothing is pruned.
    method: str = chosen("", ("", "gradual", "one_shot", "early_bird", "keep", "imp"))
    score: str = chosen("magnitude", ("magnitude", "gradient", "taylor", "movement"))  # the lowest go
    scope: str = chosen("layer", ("layer", "global"))  # each array by itself, or all in one ranking
    # Single "weights"; or whole "channels" within blocks, with all that is tied to them, which can then be cut out.
    structure: str = chosen("weights", ("weights", "channels"))
    multiple_of: int = ranged(1, least=1)  # channels: how many stay of a group is rounded up to a multiple of this
    schedule: str = chosen("cosine", ("cosine", "cubic"))
    initial: float = share(0.0)  # share of zeros at begin
    final: float = share(0.6)  # and at end
    begin: Duration = field(default_factory=Duration)
    end: Duration = field(default_factory=Duration)
    every: Duration = field(default_factory=lambda: Duration(epochs=1))  # between two drawings
    factors: tuple[str, ...] = free(())  # of the sparsity, as PATTERN=FACTOR: head.kernel=0.5; 0 spares
    dense: str = place("")  # the work folder of a run without pruning, for sparsity.png
    # Early bird: what the last distances between masks, so many, have to be below; then "mask" prunes, and "report"
    # only says so.
    limit: float = ranged(0.1, above=0, most=1)
    length: int = ranged(5, least=1)
    on_ticket: str = chosen("mask", ("mask", "report"))
    # Iterative: so many levels after the dense one, each without this share of the weights that were left. A level
    # starts from the dense one's state at step "rewind", or at step 0 with reset="init"; with "final" from the weights
    # with which the level before ended, and the rest of that state.
    levels: int = ranged(10, least=1)
    rate: float = ranged(0.2, above=0, below=1)
    rewind: Duration = field(default_factory=Duration)
    reset: str = chosen("rewind", ("rewind", "init", "final"))
    # Beside each level the same with as many weights of every array that chance chose, or with other initial values.
    controls: tuple[str, ...] = stated((), "random, reinit or both", lambda names: {*names} <= {"random", "reinit"})


@dataclass
class MeshConfig:
    """How many devices share the batch only (``data``) and share the parameters too (``fsdp``)."""

    data: int = ranged(-1, least=-1)  # -1 = all that fsdp leaves
    fsdp: int = ranged(1, least=1)


@dataclass
class DistributedConfig:
    """Several processes, one or more a host; the last three are found by JAX on Cloud TPU, Slurm and the like."""

    enabled: bool = False
    coordinator_address: str = free("")  # host:port of process 0
    num_processes: int = ranged(0, least=0)
    process_id: int = ranged(-1, least=-1)


@dataclass
class Config:
    """One run of ``train_tpu.py``."""

    task: str = free("classification")  # or another file of evmamba_jax/tasks
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    seed: int = ranged(0, least=0, most=2**32 - 1)
    batch_size: int = ranged(1024, least=1)  # images a step over all devices and accumulation rounds
    accumulation: int = ranged(1, least=1)  # rounds of forward and backward a step
    duration: Duration = field(default_factory=lambda: Duration(epochs=300))
    log_every: Duration = field(default_factory=lambda: Duration(steps=50))
    eval_every: Duration = field(default_factory=lambda: Duration(epochs=1))  # a checkpoint follows every evaluation
    save_every: Duration = field(default_factory=lambda: Duration(epochs=1))
    # Evaluations in a row that find nothing better, after which the run ends; 0: it goes on to its last step. A run
    # with it stands for its best checkpoint, one without for its newest.
    early_stopping: int = ranged(0, least=0)
    keep_last: int = ranged(3, least=1)
    keep_best: int = ranged(1, least=0)
    # Start from a file of official weights, the folder of a converted model or another run, hf-hub:owner/name, or
    # "official": the released file of the model.
    init_from: str = place("")
    eval_only: bool = False  # evaluate init_from, or what the work folder stands for
    confusion: bool = False  # with eval_only: also draw confusion.png, which classes are taken for which

    def validate(self) -> None:
        """Raise a UserError for values that no task can work with, before anything is loaded."""
        ranges.check(self, "config.")
        self.data.validate()
        for name in ("duration", "log_every", "eval_every", "save_every"):
            length = getattr(self, name)
            if not (length.steps or length.epochs):
                raise UserError(f"config.{name} is {length}; set steps or epochs to a positive number")
        if self.optim.min_lr > self.optim.lr:
            raise UserError(
                f"config.optim.min_lr is {self.optim.min_lr} and config.optim.lr {self.optim.lr}, from which the rate "
                "falls to it: lower min_lr, or raise lr"
            )
        self._validate_milestones()
        if self.pruning.initial > self.pruning.final:
            raise UserError(
                f"config.pruning.final is {self.pruning.final} and initial {self.pruning.initial}: sparsity never falls"
            )
        join = self.distributed
        if join.num_processes and join.process_id >= join.num_processes:
            raise UserError(
                f"config.distributed.process_id is {join.process_id}; of num_processes={join.num_processes} the last "
                f"is {join.num_processes - 1}"
            )

    def _validate_milestones(self) -> None:
        optim = self.optim
        if (optim.schedule == "milestones") != bool(optim.milestones):
            raise UserError(
                f"config.optim.schedule is {optim.schedule!r} and milestones {tuple(optim.milestones)}: "
                "name some with schedule='milestones', and none with another"
            )
        if optim.milestones and (optim.cooldown.steps or optim.cooldown.epochs):
            raise UserError(
                f"config.optim.cooldown is {optim.cooldown}, but with schedule='milestones' there is none: set it to 0"
            )

    def to_json(self) -> str:
        """Return the resolved configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=_as_json)


def _as_json(value: Any) -> Any:
    """Return what JSON has for what a configuration may hold besides."""
    return value.item() if isinstance(value, np.generic) else str(value)
