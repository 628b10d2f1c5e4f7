"""A second task, and the config that names it: which pixels of an image belong to the digit, and how many there are.

It has what classification has not: a loss of named parts, a metric that is no sum over images, a figure of which less
is better, a further item in the train state, and settings of its own.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from evmamba_jax.checkpoints import load_model
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import decode
from evmamba_jax.data.device import normalize
from evmamba_jax.tasks import Collector, Figure, Task, register
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig
from evmamba_jax.weights import Weights


@dataclasses.dataclass
class MaskConfig(Config):
    threshold: int = 100  # grey levels above it are the digit's


def get_config() -> MaskConfig:
    return MaskConfig(
        task="digit_mask",
        model=ModelConfig("mask_net", dtype="float32"),
        data=DataConfig("digits", eval_split="test", image_size=8, in_channels=1, mean=(0.3,), std=(0.38,)),
        optim=OptimConfig(lr=2e-2, warmup=Duration(steps=2), ema_decay=0.8),
        batch_size=32,
        duration=Duration(steps=24),
        log_every=Duration(steps=4),
        eval_every=Duration(steps=8),
        save_every=Duration(steps=4),
        keep_last=2,
    )


class Net(nnx.Module):
    """Logits of the mask (B, H, W, 1) and of the share of its pixels (B,)."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.mask = nnx.Conv(8, 1, (3, 3), rngs=rngs)
        self.share = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, images):
        x = jax.nn.relu(self.norm(self.first(images)))
        return self.mask(x), self.share(x.mean((1, 2)))[:, 0]


@dataclasses.dataclass(frozen=True)
class Masks:
    """Images with a mask each, both flipped at random."""

    config: MaskConfig

    def decode(self, record):
        return decode(record["image"], 1)

    def train(self, decoded, rng):
        return self.evaluate(decoded[:, ::-1] if rng.random() < 0.5 else decoded)

    def evaluate(self, decoded):
        return {"image": np.ascontiguousarray(decoded), "mask": (decoded > self.config.threshold).astype(np.uint8)}

    def blank(self, *, training):
        return {"image": np.zeros((8, 8, 1), np.uint8), "mask": np.zeros((8, 8, 1), np.uint8)}


class WorstOverlap(Collector):
    """The smallest intersection over union of any image."""

    def __init__(self):
        self.worst = 1.0

    def add(self, rows, answers, own):
        for mask, found, weight in zip(rows["mask"] > 0, answers[own] > 0, rows["weight"], strict=True):
            if weight:
                self.worst = min(self.worst, (mask & found).sum() / max(1, (mask | found).sum()))


@register("digit_mask")
class DigitMask(Task):
    chooses = Figure("error", higher=False, title="pixels that are wrong (%)")
    parts = ("mask_loss", "share_loss")

    def abstract_model(self):
        model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
        model.eval()
        return model

    def build_model(self):
        return Net(nnx.Rngs(self.config.seed))

    def load(self, place, *, ema="better"):
        return Weights(*load_model(place, ema=ema is True), str(place), "")

    def extra(self, model):
        return {"marks": {name: p > 0 for name, p in model.params.items()}}

    def reader(self):
        return Masks(self.config)

    def inputs(self, key, batch):
        images = normalize(batch["image"], self.config.data.mean, self.config.data.std)
        return images + 0.1 * jax.random.normal(key, images.shape), batch["mask"]

    def loss(self, model, inputs, key, moment):
        images, masks = inputs
        logits, share = model(images)
        masks = masks.astype(jnp.float32)
        mask_loss = optax.losses.sigmoid_binary_cross_entropy(logits, masks).mean()
        share_loss = ((jax.nn.sigmoid(share) - masks.mean((1, 2, 3))) ** 2).mean()
        return mask_loss + share_loss, {"mask_loss": mask_loss, "share_loss": share_loss}

    def evaluate(self, model, batch, *, detailed):
        logits, _ = model(normalize(batch["image"], self.config.data.mean, self.config.data.std))
        wrong = ((logits > 0) != (batch["mask"] > 0)).mean((1, 2, 3))
        return {"wrong": wrong @ batch["weight"]}, logits

    def collector(self, *, pictures):
        return WorstOverlap()

    def metrics(self, sums, collector):
        return {"error": 100 * float(sums["wrong"]) / float(sums["examples"]), "worst_overlap": float(collector.worst)}

    def told(self, figures):
        return f"{figures['error']:.2f} % of the pixels wrong"

    def pictures(self, folder, collector):
        (folder / "worst.txt").write_text(f"{collector.worst}\n")

    def tables(self, folder: Path, sums, collectors, best, whose, source):
        (folder / "wrong.txt").write_text(f"{whose}: {float(sums['model']['wrong'])}\n")
        return ["wrong.txt"]
