"""The course project's model: its recorded logits, features and gradients, and what its released files hold."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from official_weights import digest, image, manifest, weights
from recorded_cases import Compared

from evmamba_jax.analysis import count_parameters
from evmamba_jax.arrays import merge, split
from evmamba_jax.models import abstract_model
from evmamba_jax.weights import from_torch, load_torch_file, to_torch
from evmamba_jax.weights.convert import table

SAME = 0.5  # limit of a difference that is a count

# Equal blocks are one program.
applied = jax.jit(lambda part, x: part(x))
tokens = jax.jit(lambda model, images: model.tokens(images))


def compare(folder: Path, x64: bool) -> Iterator[Compared]:
    """Yield the comparisons of the cases of a folder, and of those released files that it describes."""
    doc = json.loads((folder / "course_vim.json").read_text())
    with np.load(folder / "course_vim.npz") as file:
        golden = dict(file)
    for case, about in doc["cases"].items():
        own = {key.removeprefix(f"{case}/"): array for key, array in golden.items() if key.startswith(f"{case}/")}
        yield from (Compared(case, *rest) for rest in _compare_case(about, own, x64))
    for name, about in json.loads((folder / "released_checkpoints.json").read_text()).items():
        yield from (Compared(name, what, off, SAME) for what, off in _compare_released(folder / name, about))


def _options(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of our model for a recorded one."""
    given, names = about["arguments"], about["state_dict"]
    side = given["image_size"]
    gate, inverted = "layers.0.se.fc1.weight", "layers.0.forward_conv.expand_conv.weight"
    return {
        "width": given["dim"],
        "in_channels": given["channels"],
        "image_size": side if isinstance(side, int) else tuple(side),
        **{name: given[name] for name in ("depth", "dt_rank", "d_state", "num_classes", "patch_size", "dropout")},
        "squeeze_excite": given["dim"] // _shape(names[gate])[0] if gate in names else None,
        "local": "inverted_residual" if inverted in names else "pointwise",
    }


def _shape(entry: Any) -> tuple[int, ...]:
    """Return the shape of an entry of a manifest, (shape, type) or the shape alone."""
    return tuple(entry[0] if entry and isinstance(entry[0], list) else entry)


def _compare_case(
    about: Mapping[str, Any], golden: Mapping[str, np.ndarray], x64: bool
) -> Iterator[tuple[str, float, float]]:
    official = weights({name: _shape(entry) for name, entry in about["state_dict"].items()})
    images = image(about["input"]["shape"], about["input"]["seed"])
    yield "weights", float(digest(official) != about["weights_sha256"]), SAME
    yield "images", float(digest({"x": images.transpose(0, 3, 1, 2)}) != about["input"]["sha256"]), SAME

    kind = np.float64 if x64 else np.float32
    model = abstract_model("course_vim", **_options(about))
    yield "parameters", abs(count_parameters(model) - about["parameters"]), SAME
    from_torch(model, {name: array.astype(kind) for name, array in official.items()})
    images = images.astype(kind)
    noise = about["float32_noise_of_logits"]
    # In float32 the deep cases are ill-conditioned: of residual streams and gradients the largest values, which are 15
    # and more times the rms, have most of the noise, whatever implements the scan.
    exact = (1e-9, 1e-9, 1e-9)
    limit, of_streams, of_gradients = exact if x64 else np.maximum([2e-5, 5e-5, 5e-4], noise * np.array([10, 50, 500]))

    streams = {"patches": tokens(model, images)}
    x = streams["patches"]
    for i, block in enumerate(model.blocks):
        x = streams[f"block{i}"] = applied(block, x)
    for name in streams.keys() & {key.removesuffix("_f64") for key in golden}:
        wanted, ours = golden[f"{name}_f64"], np.asarray(streams[name])
        ours = ours if ours.shape == wanted.shape else ours[:, ::9, ::5]
        yield name, _difference(ours, wanted, about["rms"][name]), of_streams

    (loss, logits), (gradients, of_images) = _loss_and_gradients(model, images, jnp.asarray(about["labels"]))
    yield "logits", _difference(logits, golden["logits_f64"], about["rms"]["logits"]), limit
    if not x64:  # the official float32 ones, which have noise of their own
        yield "float32 logits", _difference(logits, golden["logits"], about["rms"]["logits"]), limit + noise
    yield "loss", abs(float(loss) - about["loss_f64"]), limit

    of_images = np.asarray(of_images).transpose(0, 3, 1, 2)
    wanted = golden["input_grad_f64"]
    of_images = of_images if of_images.shape == wanted.shape else of_images[:, :, ::5, ::7]
    yield "gradient of the images", _difference(of_images, wanted, _rms(wanted)), of_gradients
    yield from (
        (f"gradient of {name}", off, of_gradients)
        for name, off in _compare_gradients(model, gradients, about, golden).items()
    )


def _loss_and_gradients(model: Any, images: np.ndarray, labels: jax.Array) -> Any:
    """Return (mean cross-entropy, logits), and the gradients of parameters and images."""
    graphdef, params, stats = split(model)

    def loss(params, images):
        logits = merge(graphdef, params, stats)(images)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean(), logits

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, images)


def _compare_gradients(
    model: Any, gradients: Mapping[str, jax.Array], about: Mapping[str, Any], golden: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Return the differences of norm and first values by official name, over the gradient's norm and rms."""
    rows = {row.official: row for row in table(model) if row.ours in gradients}
    ours = {name: row.layout.to_official(np.asarray(gradients[row.ours])) for name, row in rows.items()}
    off = {name: float(np.abs(ours.pop(name)).max()) for name in about["parameters_without_gradient"]}
    names = about["gradient_names"]
    if set(ours) != set(names):
        return off | dict.fromkeys(set(ours) ^ set(names), np.inf)
    for name, norm, first in zip(names, golden["grad_l2_f64"], golden["grad_first8_f64"], strict=True):
        values = ours[name].ravel()
        rms = norm / np.sqrt(values.size)
        of_first = _difference(values[:8], first[: values.size], rms)
        off[name] = max(of_first, abs(float(np.linalg.norm(values.astype(np.float64))) - norm) / (norm or 1.0))
    return off


def _compare_released(file: Path, about: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield what is off in names, sizes and zeros of a released file; where it lies in the folder, of its content."""
    kinds = ({}, {"squeeze_excite": 4}, {"local": "inverted_residual"})
    models = (abstract_model("course_vim", **options) for options in kinds)
    model = next((model for model in models if count_parameters(model) == about["parameters"]), None)
    if model is None:
        yield "parameters", np.inf
        return
    shapes, zeros = manifest(model), about["zeros"]
    yield "names", abs(len(shapes) - about["names"])
    if zeros:  # round(0.6 * size) of every linear layer and convolution, round(0.3 * size) of the head
        pruned = {name: np.prod(shape) for name, shape in shapes.items() if name.endswith("weight") and len(shape) > 1}
        yield "names with zeros", len(pruned.keys() ^ zeros.keys())
        for name in pruned.keys() & zeros.keys():
            share = 0.3 if name.startswith("output_head") else 0.6
            yield f"zeros of {name}", abs(round(share * int(pruned[name])) - zeros[name])
    if not file.is_file():
        return
    yield "sha256", float(hashlib.sha256(file.read_bytes()).hexdigest() != about["sha256"])
    given = load_torch_file(file)
    from_torch(model, given)
    back = to_torch(model)
    yield "names of the file", len(given.keys() ^ back.keys())
    for name, array in given.items():
        yield f"{name} there and back", float(not np.array_equal(back[name], array))
        exact = int((back[name] == 0).sum())
        yield f"zeros of {name} in the file", abs(exact - zeros[name]) if name in zeros else 0.0


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def _difference(ours: Any, wanted: np.ndarray, scale: float) -> float:
    """Return the largest difference over ``scale``; infinite where the shapes differ, absolute where it is zero."""
    ours = np.asarray(ours, np.float64)
    return float(np.abs(ours - wanted).max() / (scale or 1.0)) if ours.shape == wanted.shape else np.inf
