"""Device transforms, traced into the training step: pure functions of a key and the global batch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange

from evmamba_jax.data.config import DataConfig


def without_padding(images: jax.Array, sizes: jax.Array) -> jax.Array:
    """Return normalised images (B, H, W, C) with zeros beyond ``sizes`` (B, 2), their heights and widths."""
    rows, columns = (jnp.arange(length) < sizes[:, axis, None] for axis, length in enumerate(images.shape[1:3]))
    return jnp.where((rows[:, :, None] & columns[:, None])[..., None], images, 0)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32) -> jax.Array:
    """Scale bytes to [0, 1] and standardise each channel.

    Args:
        images: uint8 (B, H, W, C).
        mean: C numbers, of images in [0, 1].
        std: C numbers.
        dtype: of the result; the arithmetic is float32.

    Returns:
        (B, H, W, C) in ``dtype``.
    """
    scaled = images.astype(jnp.float32) / 255
    return ((scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)


def random_erasing(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Replace one random box of some images by standard normal noise.

    Each image on its own: with ``probability``, up to ten tries of an area uniform in (0.02, 1/3) of the image and a
    height / width log-uniform in (0.3, 1/0.3); the first box smaller than the image on both sides is taken.

    Args:
        key: typed PRNG key.
        images: normalised (B, H, W, C), float.
        probability: that an image is erased.

    Returns:
        (B, H, W, C) in the images' dtype.

    Source: timm.data.RandomErasing, mode "pixel", count 1.
    """
    batch, height, width, _ = images.shape
    tries = 10
    key_on, key_area, key_aspect, key_top, key_left, key_noise = jax.random.split(key, 6)
    area = height * width * jax.random.uniform(key_area, (batch, tries), minval=0.02, maxval=1 / 3)
    aspect = jnp.exp(jax.random.uniform(key_aspect, (batch, tries), minval=jnp.log(0.3), maxval=jnp.log(1 / 0.3)))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
    erased = fits.any(axis=1) & jax.random.bernoulli(key_on, probability, (batch,))
    # Where no box fits, the upper bounds below may be empty; `erased` is then False and the draw is not used.
    top = jax.random.randint(key_top, (batch,), 0, jnp.maximum(height - h, 0) + 1)
    left = jax.random.randint(key_left, (batch,), 0, jnp.maximum(width - w, 0) + 1)
    box = _inside(top, top + h, height)[:, :, None] & _inside(left, left + w, width)[:, None, :]
    noise = _normal(key_noise, images.shape).astype(images.dtype)
    return jnp.where((box & erased[:, None, None])[..., None], noise, images)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw standard normal numbers, float32 (B, H, ...), the two halves of H from the same bits.

    Box and Muller's transform takes less than half the operations of ``jax.random.normal``, which draws 32 bits a
    number and inverts erf: here the radius has 16 bits and the angle has 16, and no number is above 4.86.
    """
    batch, height, *rest = shape
    bits = jax.random.bits(key, (batch, -(-height // 2), *rest), "uint32")
    low, high = ((part.astype(jnp.int32) + 0.5) / 65536 for part in (bits & 0xFFFF, bits >> 16))
    radius = jnp.sqrt(-2 * jnp.log(low))
    # The sine of an angle within a quarter turn; the sign of the cosine is a bit of its own, here the 16 bits' first.
    is_left = high >= 0.5
    quarter = 4 * jnp.where(is_left, high - 0.5, high) - 1  # quarter turns, from -1 to 1
    sine = _sine(quarter)
    cosine = jnp.sqrt(jnp.maximum(1 - sine * sine, 0))
    return jnp.concatenate([radius * sine, radius * jnp.where(is_left, -cosine, cosine)], 1)[:, :height]


def _sine(quarter_turns: jax.Array) -> jax.Array:
    """Return the sine of angles from -1 to 1, within 1e-7.

    Source: Hastings, Approximations for Digital Computers (1955), sheet 16.
    """
    factors = (0.00015148419, -0.00467376557, 0.07968967928, -0.64596371106, 1.57079631847)
    return quarter_turns * jnp.polyval(jnp.asarray(factors, quarter_turns.dtype), quarter_turns**2)


def _inside(start: jax.Array, stop: jax.Array, length: int) -> jax.Array:
    """Return bool (..., length): the positions from ``start`` to below ``stop``."""
    position = jnp.arange(length)
    return (start[..., None] <= position) & (position < stop[..., None])


def one_hot_smooth(labels: jax.Array, num_classes: int, label_smoothing: float) -> jax.Array:
    """Turn labels into smoothed targets.

    Args:
        labels: int32 (B,).
        num_classes: K.
        label_smoothing: eps.

    Returns:
        float32 (B, K): 1 - eps + eps / K at the label, eps / K elsewhere.
    """
    return jax.nn.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes


def partners(items: jax.Array) -> jax.Array:
    """Return each item's partner in its place: (B, ...) -> (B, ...), B even. Two items are each other's partners.

    The partner is four places away, within eight that follow each other, so that partners are on the same device
    wherever a device has a multiple of eight images, and are different images also where each comes up to four times in
    a row. In batches that are not a multiple of eight it is half a batch away.
    """
    apart = 4 if len(items) % 8 == 0 else len(items) // 2
    return rearrange(
        rearrange(items, "(n pair apart) ... -> n pair apart ...", pair=2, apart=apart)[:, ::-1],
        "n p a ... -> (n p a) ...",
    )


def mixup_cutmix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    mix_prob: float = 1.0,
    switch_prob: float = 0.5,
    mixup_mode: str = "batch",
    mixup_batch: int = 0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Mix every image with its partner by mixup or cutmix.

    Each draw decides whether to mix at all, by which of the two (cutmix with ``switch_prob`` where both are on), lambda
    from Beta(alpha, alpha), and cutmix's box, whose centre is uniform over the pixels and whose sides are
    sqrt(1 - lambda) of the image's, clipped at the border; lambda then becomes the share of pixels that stay.

    Args:
        key: typed PRNG key.
        images: normalised (B, H, W, C), float; B even.
        labels: int32 (B,), or float32 (B, K) of 0 and 1 where an image may have several.
        num_classes: K.
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of cutmix; 0 turns it off.
        mix_prob: probability that anything is mixed.
        switch_prob: probability of cutmix where both are on.
        mixup_mode: one draw for "batch", a "pair" of partners, or each image ("elem").
        mixup_batch: how many images that follow each other share the draw of mode "batch"; 0 for all.
        label_smoothing: eps of the targets.

    Returns:
        images (B, H, W, C) in the images' dtype, and targets, float32 (B, K), whose rows sum to 1 for single labels.

    Source: timm.data.Mixup, where the partner is the same image of the reversed batch; in a batch of random order that
    is the same, and there the images would have to change devices.
    """
    if labels.ndim == 2:
        targets = labels * (1 - label_smoothing) + label_smoothing / 2
    else:
        targets = one_hot_smooth(labels, num_classes, label_smoothing)
    if not (mixup or cutmix):
        return images, targets
    batch, height, width, _ = images.shape
    key_on, key_switch, key_mixup, key_cutmix, key_row, key_column = jax.random.split(key, 6)
    number = jnp.arange(batch)
    draw = {  # of each image
        "batch": number // (mixup_batch or batch),
        "pair": jnp.minimum(number, partners(number)),
        "elem": number,
    }[mixup_mode]
    draws = (-(-batch // (mixup_batch or batch)) if mixup_mode == "batch" else batch,)
    mixed = jax.random.bernoulli(key_on, mix_prob, draws)[draw]
    use_cutmix = jax.random.bernoulli(key_switch, switch_prob if mixup and cutmix else float(not mixup), draws)[draw]
    keep_mixup = _beta(key_mixup, mixup, draws)[draw] if mixup else 1.0
    keep_cutmix = _beta(key_cutmix, cutmix, draws)[draw] if cutmix else jnp.ones(batch)
    side = jnp.sqrt(1 - keep_cutmix)
    rows = _centred(jax.random.randint(key_row, draws, 0, height)[draw], side, height)
    columns = _centred(jax.random.randint(key_column, draws, 0, width)[draw], side, width)
    box = rows[:, :, None] & columns[:, None, :] & (mixed & use_cutmix)[:, None, None]

    # How much of its label an image keeps, and of its pixels outside of the box.
    lam = jnp.where(mixed, jnp.where(use_cutmix, 1 - rows.mean(1) * columns.mean(1), keep_mixup), 1.0)[:, None]
    keep = jnp.where(mixed & ~use_cutmix, keep_mixup, 1.0)[:, None, None, None]
    # Without the barriers a TPU draws the noise in the images twice, once for each reader, and turns them in float32.
    images = jax.lax.optimization_barrier(images)
    others = jax.lax.optimization_barrier(partners(images))
    pixels = jnp.where(box[..., None], others, images * keep + others * (1 - keep))
    return pixels.astype(images.dtype), targets * lam + partners(targets) * (1 - lam)


def _beta(key: jax.Array, alpha: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw from Beta(alpha, alpha); with alpha 1 that is the uniform distribution, which takes no sampler's loops."""
    return jax.random.uniform(key, shape) if alpha == 1 else jax.random.beta(key, alpha, alpha, shape)


def _centred(centre: jax.Array, share: jax.Array, length: int) -> jax.Array:
    """Return bool (n, length): intervals of n shares of the length around their centres, clipped to the image."""
    half = jnp.floor(length * share).astype(jnp.int32) // 2
    return _inside(centre - half, centre + half, length)


def train_augment(
    key: jax.Array, images: jax.Array, labels: jax.Array, config: DataConfig, num_classes: int, dtype=jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Normalise, erase, mix and smooth one global batch.

    Args:
        key: typed PRNG key of this step.
        images: uint8 (B, H, W, C).
        labels: int32 (B,), or float32 (B, K) of 0 and 1 where an image may have several.
        config: reads the device-side fields.
        num_classes: K.
        dtype: of the images, also between the transforms; the arithmetic is float32.

    Returns:
        images (B, H, W, C) in ``dtype``, and targets, float32 (B, K). The same for any number of devices.
    """
    key_erase, key_mix = jax.random.split(key)
    images = normalize(images, config.mean, config.std, dtype)
    if config.random_erasing:
        images = random_erasing(key_erase, images, config.random_erasing)
    return mixup_cutmix(
        key_mix,
        images,
        labels,
        num_classes,
        mixup=config.mixup,
        cutmix=config.cutmix,
        mix_prob=config.mix_prob,
        switch_prob=config.switch_prob,
        mixup_mode=config.mixup_mode,
        mixup_batch=config.mixup_batch,
        label_smoothing=config.label_smoothing,
    )
