"""UperNet with its auxiliary head, trained and tested, as recorded in ``upernet``."""

import itertools
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from official_weights import digest, image, tensor
from recorded_cases import Compared, difference

from evmamba_jax.arrays import Arrays, fill, merge, split
from evmamba_jax.layers.projections import conv
from evmamba_jax.segmentation import UperNet, UperNetConfig, multi_scale, slide, to_original, whole
from evmamba_jax.weights.convert import fill_rows
from evmamba_jax.weights.layers import CONV, Row, below, kernel
from evmamba_jax.weights.upernet import auxiliary_head, decode_head

# How near the two largest logits may be where float32 chooses another class.
TIE = 1e-4
PADDING = (3, 5)  # rows below and columns on the right of ``whole_padded_flipped``


class FourConvs(nnx.Module):
    """The small stand-in for a backbone: a 7x7 convolution of stride 4, three 3x3 of stride 2, tanh after each."""

    def __init__(self, channels: list[int], *, rngs: nnx.Rngs):
        self.stem = conv(3, channels[0], 7, stride=4, padding=3, rngs=rngs)
        pairs = itertools.pairwise(channels)
        self.down = nnx.List([conv(*pair, 3, stride=2, padding=1, rngs=rngs) for pair in pairs])

    def features(self, images: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        x, maps = images, []
        for layer in (self.stem, *self.down):
            x = jnp.tanh(layer(x))
            maps.append(x)
        return maps


def rows() -> list[Row]:
    """Return the rows of the whole model."""
    backbone = [
        *kernel("stem", "stem", CONV),
        *(row for i in range(3) for row in kernel(f"down.{i}", f"down.{i}", CONV)),
    ]
    parts = {"backbone": backbone, "decode_head": decode_head(), "auxiliary_head": auxiliary_head()}
    return [row for name, part in parts.items() for row in below(name, name, part)]


def build(doc: Mapping[str, Any]) -> UperNet:
    """Return the model with its recorded weights."""
    weights = {name: tensor(name, tuple(shape)) for name, (shape, *_) in doc["state_dict"].items()}
    weights = {
        name: array * np.float32(factor) if (factor := doc["state_dict"][name][2]) != 1 else array
        for name, array in weights.items()
    }
    assert digest(weights) == doc["weights_sha256"]
    used = doc["config_used"]
    head, aux = used["decode_head"], used["auxiliary_head"]
    config = UperNetConfig(
        num_classes=head["num_classes"],
        width=head["channels"],
        aux_width=aux["channels"],
        aux_weight=aux["loss_decode"]["loss_weight"],
        dropout=0.0,
    )
    channels, rngs = used["backbone"]["channels"], nnx.Rngs(0)
    model = UperNet(config, FourConvs(channels, rngs=rngs), channels, rngs=rngs)
    fill_rows(model, rows(), weights)
    model.eval()
    return model


class Recorded:
    """The arrays of the file, of which some are thinned out, and what is allowed of each."""

    def __init__(self, folder: Path, x64: bool):
        self.doc = json.loads((folder / "upernet.json").read_text())
        self.arrays = np.load(folder / "upernet.npz")
        self.x64 = x64
        self.dtype = np.float64 if x64 else np.float32

    def limit(self, name: str) -> float:
        if self.x64:
            return 1e-6 if "/grad/" in name else 1e-9
        return max(10 * (self.doc["float32_noise"].get(name) or 0), 2e-5)

    def compare(self, name: str, ours: Any) -> Iterator[Compared]:
        """Compare an array in the official layout: what is kept of it, and its mean."""
        ours, facts = np.asarray(ours, np.float64), self.doc["arrays"][name]
        case = name.rsplit("/", 1)[0]
        kept = ours[tuple(slice(None, None, step) for step in facts["steps"])] if "steps" in facts else ours
        wanted = self.arrays[name]
        kept = kept.reshape(wanted.shape) if wanted.size == 1 else kept  # of numbers the file has arrays
        yield Compared(case, name, difference(kept, wanted), self.limit(name))
        if f"{name}/mean" in self.arrays:
            mean = ours.mean(tuple(range(2, ours.ndim)) if ours.ndim > 2 else 0)
            wanted = self.arrays[f"{name}/mean"]
            yield Compared(case, f"{name}/mean", difference(mean, wanted), self.limit(f"{name}/mean"))

    def compare_choice(self, name: str, ours: np.ndarray) -> Iterator[Compared]:
        """Compare the classes that logits or probabilities (H, W, K) choose, but for near ties in float32."""
        two = np.sort(ours, -1)[..., -2:]
        near = (two[..., 1] - two[..., 0] < TIE) & (not self.x64)
        other = (ours.argmax(-1) != self.arrays[name]) & ~near
        yield Compared(name.rsplit("/", 1)[0], name, float(other.sum()), 0.5)


def nchw(x: Any) -> np.ndarray:
    """Return a map (B, H, W, C) in the official layout."""
    return np.asarray(x).transpose(0, 3, 1, 2)


def forward(recorded: Recorded, model: UperNet, images: jax.Array) -> Iterator[Compared]:
    """Compare maps and the parts of the pooling pyramid."""

    @jax.jit
    def run(images):
        maps = model.features(images)
        pooling = model.decode_head.pooling
        return maps, pooling.branches(maps[-1]), pooling(maps[-1])

    maps, branches, pooled = run(images)
    for i, x in enumerate(maps):
        yield from recorded.compare(f"feat/stage{i + 1}", nchw(x))
    for i, x in enumerate(branches):
        yield from recorded.compare(f"ppm/branch{i}", nchw(x))
    yield from recorded.compare("ppm/out", nchw(pooled))


def training(recorded: Recorded, model: UperNet, images: jax.Array, mode: str) -> Iterator[Compared]:
    """Compare logits, losses and gradients with running ("eval") or batch ("train") statistics."""
    labels = jnp.asarray(recorded.arrays["train/labels"])
    if mode == "train":
        model = merge(*split(model))
        model.train()
    graphdef, params, stats = split(model)

    @jax.jit
    def run(params: Arrays):
        def loss(params):
            twin = merge(graphdef, params, stats)
            logits = twin.both(images)
            total, parts = twin.loss_of(*logits, labels)
            return total, (parts, logits, split(twin).batch_stats)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, (parts, (logits, aux_logits), after)), gradients = run(params)
    case = f"train/{mode}"
    yield from recorded.compare(f"{case}/logits", nchw(logits))
    yield from recorded.compare(f"{case}/aux_logits", nchw(aux_logits))
    for name, of_head in (("decode", ""), ("aux", "aux_")):
        yield from recorded.compare(f"{case}/{name}.loss_ce", parts[f"{of_head}loss"])
        yield from recorded.compare(f"{case}/{name}.acc_seg", np.reshape(parts[f"{of_head}accuracy"], 1))
    yield from recorded.compare(f"{case}/total", total)

    official = {
        row.official: row.layout.to_official(np.asarray(gradients[row.ours])) for row in rows() if row.ours in gradients
    }
    names = recorded.doc[f"train/{mode}/grad_names"]
    flat = [np.asarray(official[name], np.float64).ravel() for name in names]
    yield from recorded.compare(f"{case}/grad/l2", [np.linalg.norm(gradient) for gradient in flat])
    first = [np.pad(gradient[:8], (0, max(8 - gradient.size, 0))) for gradient in flat]
    yield from recorded.compare(f"{case}/grad/first8", first)
    if mode == "train":
        for kind in ("mean", "var"):
            yield from recorded.compare(f"{case}/running_{kind}_after", after[f"decode_head.fuse.norm.{kind}"])


def inference(recorded: Recorded, model: UperNet) -> Iterator[Compared]:
    """Compare whole, sliding and multi-scale inference."""
    sizes, inputs = recorded.doc["sizes"], recorded.doc["inputs"]

    def images(given: Any) -> jax.Array:
        return jnp.asarray(image(*given), recorded.dtype)

    segment = jax.jit(lambda x: model(x))
    original = tuple(sizes["ori"])
    x = images(inputs["whole"])
    yield from recorded.compare("whole/head_logits", nchw(segment(x)))
    logits = np.asarray(to_original(whole(segment, x), original))[0]
    yield from recorded.compare("whole/logits_at_ori", logits.transpose(2, 0, 1))
    yield from recorded.compare_choice("whole/pred", logits)

    x = images(inputs["whole_padded_flipped"])
    unpadded = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, PADDING[0]), (0, PADDING[1]), (0, 0)))
    logits = np.asarray(to_original(whole(segment, x), original, unpadded=unpadded, flipped=True))[0]
    yield from recorded.compare("whole_padded_flipped/logits_at_ori", logits.transpose(2, 0, 1))

    window = {"window": tuple(sizes["window"]), "stride": tuple(sizes["stride"])}
    logits = jax.jit(partial(slide, lambda x: model(x), **window))(images(inputs["slide"]))
    yield from recorded.compare("slide/logits", nchw(logits))
    yield from recorded.compare_choice("slide/pred", np.asarray(logits)[0])

    scaled = [images(given) for given in inputs["tta"]]
    original = tuple(sizes["tta_ori"])
    for name, x in (("logits_first", scaled[0]), ("logits_first_flipped", scaled[0][:, :, ::-1])):
        logits = to_original(whole(segment, x), original, flipped=name.endswith("flipped"))
        yield from recorded.compare(f"tta/{name}", nchw(logits)[0])
    mean = np.asarray(multi_scale(partial(whole, segment), scaled, original))[0]
    yield from recorded.compare("tta/mean_probability", mean.transpose(2, 0, 1))
    yield from recorded.compare_choice("tta/pred", mean)


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    recorded = Recorded(folder, x64)
    model = build(recorded.doc)
    if x64:  # the official code ran in float64 with these float32 weights
        wide = [{path: jnp.asarray(array, jnp.float64) for path, array in part.items()} for part in split(model)[1:]]
        fill(model, *wide)
    images = jnp.asarray(image(*recorded.doc["inputs"]["train"]), recorded.dtype)
    yield from forward(recorded, model, images)
    for mode in ("eval", "train"):
        yield from training(recorded, model, images, mode)
    yield from inference(recorded, model)
