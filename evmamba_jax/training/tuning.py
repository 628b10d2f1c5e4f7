"""Which parameters of a model are trained, and how fast each."""

import dataclasses
import difflib
import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax import nnx

from evmamba_jax import lora
from evmamba_jax.arrays import Arrays, split
from evmamba_jax.config import TuneConfig
from evmamba_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is trained.

    Attributes:
        trained: paths of the parameters that change; the others keep their bits.
        scales: by path of each that changes, the factor of its learning rate.
        told: the same for the reader, in a line; empty where everything is trained at one rate.
    """

    trained: tuple[str, ...]
    scales: Mapping[str, float]
    told: str

    def of(self, params: Arrays) -> Arrays:
        """Return the parameters that change."""
        return {name: params[name] for name in self.trained}


def prepare(config: TuneConfig, params: Mapping[str, Any], *, head: str, seed: int) -> Mapping[str, Any]:
    """Return a model's parameters as the run has them: with thin matrices beside some if the method is LoRA."""
    if config.method != "lora":
        return params
    names = [name for name in lora.chosen(params, config.lora_targets) if not fnmatch.fnmatchcase(name, head)]
    return lora.added(params, names, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed)


def tuning(config: TuneConfig, params: Mapping[str, Any], *, head: str) -> Tuning:
    """Return what a configuration trains.

    Args:
        config: method, patterns, rates.
        params: as :func:`prepare` gives them; shapes will do.
        head: pattern of the paths of the model's head.

    Raises:
        UserError: a pattern that is the path of nothing; nothing is left to train.
    """
    in_head = lambda name: fnmatch.fnmatchcase(name, head)  # noqa: E731
    for pattern in config.freeze:
        if not fnmatch.filter(params, pattern):
            near = difflib.get_close_matches(pattern, _prefixes(params), n=3, cutoff=0.3)
            near = [f"{name}.*" if name not in params else name for name in near]
            raise UserError(
                f"config.tune.freeze has {pattern!r}, which is the path of no parameter; "
                f"near it are {', '.join(near) or ', '.join(list(params)[:3])}"
            )

    def is_trained(name: str) -> bool:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.freeze) or name.endswith(".lora_scale"):
            return False
        return config.method == "full" or in_head(name) or (config.method == "lora" and lora.is_added(name))

    trained = tuple(name for name in params if is_trained(name))
    if not trained:
        raise UserError(
            f"config.tune.freeze={tuple(config.freeze)} with method={config.method!r} leaves nothing to train: "
            "take a pattern away"
        )
    layers = layer_numbers(params, head=head)
    last = max(layers.values())

    def scale(name: str) -> float:
        part = config.head_lr if in_head(name) else config.embed_lr if _EMBEDDING.match(name) else 1.0
        return config.layer_decay ** (last - layers[name]) * part

    scales = {name: scale(name) for name in trained}
    return Tuning(trained, scales, _told(config, params, trained))


def _told(config: TuneConfig, params: Mapping[str, Any], trained: Sequence[str]) -> str:
    size = lambda names: sum(math.prod(params[name].shape) for name in names)  # noqa: E731
    if len(trained) == len(params) and {config.layer_decay, config.head_lr, config.embed_lr} == {1}:
        return ""
    words = f"training {size(trained):,} of {size(params):,} parameters (tune.method={config.method!r})"
    if config.layer_decay != 1:
        words += f"; the learning rate falls by {config.layer_decay:g} a layer from the head down"
    return words


def _prefixes(params: Mapping[str, Any]) -> list[str]:
    """Return the paths of all parameters, and of the modules that hold them."""
    found: dict[str, None] = {}
    for name in params:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]))
    return list(found)


_BODY = "backbone."  # of a model with heads
_BLOCK = re.compile(r"(?:stages\.\d+\.)?blocks\.\d+(?=\.)")
_EMBEDDING = re.compile(r"(?:backbone\.)?(?:patch_embed|pos_embed|cls_token)\b")
_DOWNSAMPLE = re.compile(r"stages\.(\d+)\.downsample\.")


def layer_numbers(params: Mapping[str, Any], *, head: str) -> dict[str, int]:
    """Return the number of the layer that each parameter belongs to, for rates that fall from the head down.

    The stem and the embeddings are layer 0; every block is one more, a downsampling belongs to the block after it, and
    the norms at the end to the last block; the head is the last layer. Of a backbone with heads, all that stands on the
    backbone is the head.

    Source: timm's ``group_matcher`` of its Swin transformer and ``group_parameters``.
    """
    composed = any(name.startswith(_BODY) for name in params)
    inner = {name: name.removeprefix(_BODY) for name in params}
    blocks = list(dict.fromkeys(match[0] for name in inner.values() if (match := _BLOCK.match(name))))
    blocks.sort(key=lambda block: [int(part) for part in re.findall(r"\d+", block)])
    number = {block: k for k, block in enumerate(blocks, 1)}

    def layer(path: str, name: str) -> int:
        if fnmatch.fnmatchcase(path, head) or (composed and path == name):
            return len(blocks) + 1
        if match := _BLOCK.match(name):
            return number[match[0]]
        if match := _DOWNSAMPLE.match(name):
            return next((number[b] for b in blocks if b.startswith(f"stages.{int(match[1]) + 1}.")), len(blocks))
        return len(blocks) if re.match(r"(out_)?norms?\.", name) else 0

    return {path: layer(path, name) for path, name in inner.items()}


def freeze_modules(model: nnx.Module, trained: Collection[str]) -> None:
    """Set the modules of which no parameter is trained to evaluation mode.

    Their batch statistics stay too, and drop path drops none of their branches.
    """
    names = split(model).params
    for path, module in nnx.iter_modules(model):
        prefix = "".join(f"{part}." for part in path)
        own = [name for name in names if name.startswith(prefix)]
        if own and not set(own) & set(trained):
            module.eval()
