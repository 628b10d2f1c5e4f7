"""The single operations of segmenters, and those on images that detectors share, as recorded in ``ops``."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from official_weights import image
from recorded_cases import Compared, difference

from evmamba_jax.data import opencv
from evmamba_jax.heads.resize import adaptive_average_pool, bilinear
from evmamba_jax.layers.resize import resize
from evmamba_jax.segmentation import cross_entropy

DISTORTIONS = {
    "brightness": opencv.adjust_brightness,
    "contrast": opencv.adjust_contrast,
    "saturation": opencv.adjust_saturation,
    "hue": opencv.adjust_hue,
}


def limits(x64: bool) -> tuple[float, float]:
    """Return what is allowed of outputs and of gradients."""
    return (1e-9, 1e-6) if x64 else (2e-5, 2e-5)


def of_maps(case: str, facts: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Return a map (B, H, W, C) as the case resizes or pools it."""
    if case.startswith("adaptive_pool"):
        return adaptive_average_pool(x, facts["size"])
    if case.startswith("nearest"):
        return resize(x, *facts["size"], "nearest")
    return bilinear(x, *facts["size"], align_corners=facts["align_corners"])


def of_image(case: str, facts: Mapping[str, Any], pixels: np.ndarray) -> np.ndarray:
    """Return an image as the case resizes or distorts it."""
    if case.startswith("photometric"):
        return DISTORTIONS[case.removeprefix("photometric_")](pixels, facts["value"])
    if case.startswith("image_rescale"):
        return opencv.resize_bilinear(pixels, *opencv.keep_ratio_size(*pixels.shape[:2], facts["scale"]))
    return opencv.resize_bilinear(pixels, *opencv.scaled_size(*pixels.shape[:2], facts["factor"]))


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield every difference from what is recorded in a folder."""
    doc, arrays = json.loads((folder / "ops.json").read_text()), np.load(folder / "ops.npz")
    dtype = np.float64 if x64 else np.float32
    for case, facts in doc["cases"].items():
        if case.startswith("seg_cross_entropy"):
            logits, target = arrays[f"{case}/in/logits"], jnp.asarray(arrays[f"{case}/in/target"])

            def loss(logits: jax.Array, facts=facts, target=target) -> jax.Array:
                return facts["loss_weight"] * cross_entropy(logits, target, over_counted=facts["avg_non_ignore"])

            value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits.transpose(0, 2, 3, 1), dtype))
            ours = {"loss": value, "grad": np.asarray(gradient).transpose(0, 3, 1, 2)}
            for (name, array), limit in zip(ours.items(), limits(x64), strict=True):
                wanted = arrays[f"{case}/out/{name}"]
                yield Compared(case, name, difference(np.reshape(array, wanted.shape), wanted), limit)
        elif case.startswith(("bilinear", "nearest", "adaptive_pool")):
            x = jnp.asarray(image(facts["input"]["shape"], facts["input"]["seed"]), dtype)
            ours = np.asarray(of_maps(case, facts, x)).transpose(0, 3, 1, 2)
            name = "pooled" if case.startswith("adaptive") else "resized"
            yield Compared(case, name, difference(ours, arrays[f"{case}/out/{name}"]), limits(x64)[0])
        elif case.startswith(("image_", "photometric")):
            ours = of_image(case, facts, arrays[f"{case}/in/image"])
            yield Compared(case, "image", difference(ours, arrays[f"{case}/out/image"], relative=False), 0.5)
    for sizes in doc["new_sizes"]:
        ours = np.array(opencv.keep_ratio_size(*sizes["hw"], sizes["scale"]))
        yield Compared("new_sizes", str(sizes["hw"]), difference(ours, np.array(sizes["new_hw"]), relative=False), 0.5)
