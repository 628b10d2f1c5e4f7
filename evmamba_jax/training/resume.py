"""What a resumed run may change: a decision for each field of its configuration, and for its data."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from evmamba_jax.errors import UserError
from evmamba_jax.tasks import Task


class Decision(NamedTuple):
    """Whether a field may change between two starts of a run.

    Attributes:
        because: what depends on it, in words; empty where it may change.
        of: what of its value must stay.
    """

    because: str = ""
    of: Callable[[Any], Any] = lambda value: value


FREE = Decision()
ORDER = Decision("on which the order of its data depends")
STATE = Decision("on which its state depends")
DRAWN = Decision("on which its masks depend")
SWITCH = Decision("and its state has a part for this only where it is above 0", lambda value: value > 0)
SHAPES = Decision("which its model is made of")  # looked at once the arrays are known to fit, which says more

DECISIONS: dict[str, Decision] = {
    "task": STATE,
    "model.name": STATE,
    "model.drop_path_rate": FREE,
    "model.dtype": FREE,
    "model.options": SHAPES,
    "model.remat": FREE,
    "data.name": ORDER,
    "data.data_dir": FREE,
    "data.train_split": ORDER,
    "data.eval_split": FREE,
    "data.classes": FREE,  # the classes themselves are compared, and with the next the pictures
    "data.held_out": FREE,
    "data.balanced": ORDER,
    "data.on_corrupt": FREE,
    "data.image_size": FREE,
    "data.in_channels": STATE,
    "data.exif_orientation": FREE,
    "data.max_pixels": FREE,
    "data.crop_pct": FREE,
    "data.crop_mode": FREE,
    "data.eval_interpolation": FREE,
    "data.crop_scale": FREE,
    "data.crop_ratio": FREE,
    "data.pad_crop": FREE,
    "data.interpolation": FREE,
    "data.hflip": FREE,
    "data.auto_augment": FREE,
    "data.color_jitter": FREE,
    "data.repeated_aug": ORDER,
    "data.num_threads": FREE,
    "data.num_workers": FREE,
    "data.mean": FREE,
    "data.std": FREE,
    "data.random_erasing": FREE,
    "data.mixup": FREE,
    "data.cutmix": FREE,
    "data.mix_prob": FREE,
    "data.switch_prob": FREE,
    "data.mixup_mode": FREE,
    "data.mixup_batch": FREE,
    "data.label_smoothing": FREE,
    "optim.name": STATE,
    "optim.betas": FREE,
    "optim.eps": FREE,
    "optim.weight_decay": SWITCH,
    "optim.no_decay": FREE,
    "optim.clip_norm": SWITCH,
    "optim.lr": FREE,
    "optim.schedule": FREE,
    "optim.milestones": FREE,
    "optim.min_lr": FREE,
    "optim.warmup_lr": FREE,
    "optim.warmup": FREE,
    "optim.warmup_prefix": FREE,
    "optim.cooldown": FREE,
    "optim.lr_changes": FREE,
    "optim.ema_decay": SWITCH,
    "optim.ema_warmup": FREE,
    "optim.mesa": FREE,
    "optim.mesa_start": FREE,
    "loss.name": FREE,
    "loss.class_weights": FREE,
    "loss.balanced": FREE,
    "tune.method": STATE,
    "tune.freeze": STATE,
    "tune.layer_decay": FREE,
    "tune.head_lr": FREE,
    "tune.embed_lr": FREE,
    "tune.lora_rank": STATE,
    "tune.lora_alpha": STATE,
    "tune.lora_targets": STATE,
    "pruning.method": STATE,
    "pruning.score": STATE,
    "pruning.scope": DRAWN,
    "pruning.structure": STATE,
    "pruning.multiple_of": DRAWN,
    "pruning.schedule": DRAWN,
    "pruning.initial": DRAWN,
    "pruning.final": DRAWN,
    "pruning.begin": DRAWN,
    "pruning.end": DRAWN,
    "pruning.every": DRAWN,
    "pruning.factors": DRAWN,
    "pruning.dense": FREE,
    "pruning.limit": DRAWN,
    "pruning.length": DRAWN,
    "pruning.on_ticket": DRAWN,
    "pruning.levels": FREE,
    "pruning.rate": DRAWN,
    "pruning.rewind": DRAWN,
    "pruning.reset": DRAWN,
    "pruning.controls": FREE,
    "mesh.data": FREE,
    "mesh.fsdp": FREE,
    "distributed.enabled": FREE,
    "distributed.coordinator_address": FREE,
    "distributed.num_processes": FREE,
    "distributed.process_id": FREE,
    "seed": ORDER,
    "batch_size": ORDER,
    "accumulation": FREE,
    "duration": FREE,  # but not below what is done: check_length
    "log_every": FREE,
    "eval_every": FREE,
    "save_every": FREE,
    "early_stopping": FREE,
    "keep_last": FREE,
    "keep_best": FREE,
    "init_from": FREE,  # a run with a checkpoint of its own continues from that
    "eval_only": FREE,
    "confusion": FREE,
}


def data_facts(source: Any) -> dict[str, Any]:
    """Return what a checkpoint says of the training split: its length and, where the source has one, a fingerprint."""
    return {"examples": len(source), "fingerprint": getattr(source, "fingerprint", None)}


def check_settings(stored: Mapping[str, Any], task: Task, source: Any, workdir: Any) -> None:
    """Compare a run's configuration and data with those it was started with, before anything is restored.

    Args:
        stored: the meta of its newest checkpoint.
        task: of the resumed run.
        source: its training split.
        workdir: names the run.

    Raises:
        UserError: the first that differs and may not.
    """
    _refuse(stored, task, workdir, {name: rule for name, rule in DECISIONS.items() if rule is not SHAPES})
    was, found = stored.get("class_names"), list(task.class_names)
    if was is not None and list(was) != found:
        k = next((k for k, (a, b) in enumerate(zip(was, found, strict=False)) if a != b), min(len(was), len(found)))
        before, now = (repr(names[k]) if k < len(names) else "none" for names in (was, found))
        raise UserError(
            f"class {k} of the data is {now}, but the run in {workdir} was started with {before} ({len(was)} classes, "
            f"now {len(found)}): give it the data it had, or choose another --workdir"
        )
    there, here = stored.get("data", {}), data_facts(source)
    if there.get("examples", here["examples"]) != here["examples"]:
        raise UserError(
            f"{source.name}, split {source.split}, has {here['examples']} examples, but the run in {workdir} was "
            f"started with {there['examples']}: give it the data it had, or choose another --workdir"
        )
    prints = there.get("fingerprint"), here["fingerprint"]
    if None not in prints and prints[0] != prints[1]:
        raise UserError(
            f"the contents of {source.name}, split {source.split}, are not those that the run in {workdir} was started "
            "with: give it the data it had, or choose another --workdir"
        )


def check_model(stored: Mapping[str, Any], task: Task, workdir: Any) -> None:
    """Compare what the shapes of the arrays do not tell of a model, once these are known to fit.

    Raises:
        UserError: it differs.
    """
    _refuse(stored, task, workdir, {name: rule for name, rule in DECISIONS.items() if rule is SHAPES})


def check_length(done: int, total: int, workdir: Any) -> None:
    """Compare the steps that a run has made with those that it is to have.

    Raises:
        UserError: it has more behind it.
    """
    if done > total:
        raise UserError(
            f"config.duration is {total} steps, but the run in {workdir} has made {done}: set a longer one, or choose "
            "another --workdir"
        )


def _refuse(stored: Mapping[str, Any], task: Task, workdir: Any, decisions: Mapping[str, Decision]) -> None:
    config = json.loads(task.config.to_json())  # as the checkpoint has it
    for name, (because, of) in decisions.items():
        here = _value(config, name)
        there = _value(stored.get("config", {}), name, here)  # an older checkpoint may know nothing of it
        if because and of(there) != of(here):
            raise UserError(
                f"config.{name} is {here!r}, but the run in {workdir} was started with {there!r}, {because}: set it "
                "back, or choose another --workdir for a new run"
            )


def _value(values: Any, name: str, otherwise: Any = None) -> Any:
    """Return a field by its dotted name."""
    for part in name.split("."):
        if part not in values:
            return otherwise
        values = values[part]
    return values
