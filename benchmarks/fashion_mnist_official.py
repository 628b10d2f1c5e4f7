"""The official EfficientVMamba on a CPU, under the recipe of a config of ours: the peer of ``fashion_mnist.py``.

    python benchmarks/fashion_mnist_official.py OFFICIAL check|train --config configs/fashion_mnist.py --workdir DIR

``OFFICIAL`` is a clone of TerryPei/EfficientVMamba. Its modules, forward and backward, run as they are. Replaced is
what cannot run or is not needed here: the CUDA kernel of the scan, by its formulas in PyTorch; timm's drop path and
truncated normal; counters of FLOPs, which nothing here calls.

Both sides are fed the very same arrays: batches of our loader in the same order, normalised and mixed by our
augmentation with the same random numbers. The learning rate of every step is from our schedule. Initial values,
drop path, clipping, AdamW and its groups are PyTorch's and the official code's own.
"""

import dataclasses
import importlib.util
import json
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from evmamba_jax.arrays import fill, merge, split
from evmamba_jax.data import device, loader
from evmamba_jax.data.sources import open_source
from evmamba_jax.measuring import machine
from evmamba_jax.reports.writer import Reporter
from evmamba_jax.tasks.classification import Classification
from evmamba_jax.training import parse_command
from evmamba_jax.training.config import Config
from evmamba_jax.training.mesh import make_mesh
from evmamba_jax.training.setup import Setup
from evmamba_jax.weights import to_torch
from pallas_kernels import selective_scan

# ---------------------------------------------------------------------------------------------------------------------
# The selective scan, in place of the CUDA kernel


class Scan:
    """The kernel's two functions, for u, delta (B, D, L), A (D, N), B, C (B, G, N, L), D and bias (D,), of one type.

    States are kept for all tokens, tokens first: (L, B, G, N, D / G).
    """

    CHUNK = 16  # images at a time: their states fit into a core's cache

    @staticmethod
    def fwd(u, delta, A, B, C, D, bias, softplus, rows):
        """Return y (B, D, L), and what ``bwd`` wants kept."""
        del rows  # channels to a CUDA block
        assert softplus
        chunks = zip(*(x.split(Scan.CHUNK) for x in (u, delta, B, C)), strict=True)
        y, states = zip(*(Scan._forward(u, delta, A, B, C, D, bias) for u, delta, B, C in chunks), strict=True)
        return torch.cat(y), torch.cat(states, 1)

    @staticmethod
    def bwd(u, delta, A, B, C, D, bias, dy, states, softplus, rows):
        """Return the gradients of u, delta, A, B, C, D and bias."""
        del rows
        assert softplus
        sliced = zip(*(x.split(Scan.CHUNK) for x in (u, delta, B, C, dy)), states.split(Scan.CHUNK, 1), strict=True)
        parts = [Scan._backward(u, delta, A, B, C, D, bias, dy, h) for u, delta, B, C, dy, h in sliced]
        du, ddelta, dA, dB, dC, dD, dbias = zip(*parts, strict=True)
        return torch.cat(du), torch.cat(ddelta), sum(dA), torch.cat(dB), torch.cat(dC), sum(dD), sum(dbias)

    @staticmethod
    def _terms(u, delta, A, B, C, bias):
        """Return u, time step before and after softplus (L, B, G, c), A (G, N, c), B, C (L, B, G, N) and the decay."""
        groups = B.shape[1]
        u, raw = (x.unflatten(1, (groups, -1)).permute(3, 0, 1, 2).contiguous() for x in (u, delta + bias[:, None]))
        B, C = (x.permute(3, 0, 1, 2).contiguous() for x in (B, C))
        A = A.unflatten(0, (groups, -1)).mT.contiguous()
        dt = F.softplus(raw)
        return u, raw, dt, A, B, C, torch.exp(dt.unsqueeze(-2) * A)

    @staticmethod
    def _forward(u_, delta, A, B, C, D, bias):
        u, _, dt, A, B, C, decay = Scan._terms(u_, delta, A, B, C, bias)
        h = (dt * u).unsqueeze(-2) * B.unsqueeze(-1)
        for t in range(1, len(h)):
            h[t].addcmul_(decay[t], h[t - 1])
        y = (h * C.unsqueeze(-1)).sum(-2)
        return y.permute(1, 2, 3, 0).flatten(1, 2) + D[:, None] * u_, h

    @staticmethod
    def _backward(u_, delta, A, B, C, D, bias, dy_, h):
        u, raw, dt, A, B, C, decay = Scan._terms(u_, delta, A, B, C, bias)
        dy = dy_.unflatten(1, A.shape[::2]).permute(3, 0, 1, 2).contiguous()
        g = C.unsqueeze(-1) * dy.unsqueeze(-2)  # the gradient of h
        for t in range(len(g) - 2, -1, -1):
            g[t].addcmul_(decay[t + 1], g[t + 1])
        gB = (g * B.unsqueeze(-1)).sum(-2)
        of_exponent = g[1:] * decay[1:] * h[:-1]  # the gradient of dt * A
        ddt = gB * u
        ddt[1:] += (of_exponent * A).sum(-2)
        as_given = lambda x: x.permute(1, 2, 3, 0).flatten(1, 2)  # noqa: E731
        ddelta = as_given(ddt * torch.sigmoid(raw))
        return (
            as_given(gB * dt) + D[:, None] * dy_,
            ddelta,
            (of_exponent * dt[1:].unsqueeze(-2)).sum((0, 1)).mT.flatten(0, 1),
            (g * (dt * u).unsqueeze(-2)).sum(-1).permute(1, 2, 3, 0),
            (h * dy.unsqueeze(-2)).sum(-1).permute(1, 2, 3, 0),
            (dy_ * u_).sum((0, 2)),
            ddelta.sum((0, 2)),
        )


# ---------------------------------------------------------------------------------------------------------------------
# The official model


class DropPath(nn.Module):
    """Timm's: keeps the branch of a sample with probability 1 - p, and then divides it by that."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or not self.p:
            return x
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p) / (1 - self.p)


def official_class(clone: Path) -> type[nn.Module]:
    """Import the official classifier, with stand-ins for the modules it imports and that need not be installed."""
    unused = dict.fromkeys(("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count"))
    stand_ins = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"DropPath": DropPath, "trunc_normal_": nn.init.trunc_normal_},
        "timm.models.registry": {"register_model": lambda function: function},
        "fvcore": {},
        "fvcore.nn": unused,
        "selective_scan_vmamba_pt202": {"selective_scan_cuda_core": Scan},
    }
    for name, contents in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    file = clone / "classification/models/vmamba_efficient.py"
    if not file.is_file():
        raise SystemExit(f"error: there is no {file}; give a clone of TerryPei/EfficientVMamba")
    sys.path.insert(0, str(clone / "classification"))
    spec = importlib.util.spec_from_file_location("vmamba_efficient", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch.cuda.amp
        spec.loader.exec_module(module)
    # Its scans turn everything into ``torch.float``, and are to leave float64 as it is.
    module.torch = types.SimpleNamespace(**vars(torch) | {"float": torch.get_default_dtype()})
    return module.EfficientVSSM


def build(clone: Path, config: Config, num_classes: int) -> nn.Module:
    """Return the official model of a config of ours; its state size is 16 whatever is asked for."""
    options = dict(config.model.options)
    model = official_class(clone)(
        dims=options.pop("width"),
        depths=list(options.pop("depths")),
        patch_size=options.pop("patch_size", 4),
        in_chans=config.data.in_channels,
        num_classes=num_classes,
        drop_path_rate=config.model.drop_path_rate,
        mlp_ratio=0.0,  # these two as in the released yaml files; the constructor's own differ
        downsample_version="v1",
    )
    if options:
        raise SystemExit(f"error: the official code has no such options: {options}")
    return model


def optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return AdamW with the official groups: 1-D tensors and names in ``.bias`` are not decayed."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
    o = config.optim
    decayed = {"params": groups[True], "weight_decay": o.weight_decay}
    return torch.optim.AdamW([decayed, {"params": groups[False], "weight_decay": 0.0}], betas=o.betas, eps=o.eps)


def update(model: nn.Module, adamw: torch.optim.AdamW, config: Config, rate: float, images, targets):
    """Make one step; return loss and gradient norm."""
    for group in adamw.param_groups:
        group["lr"] = rate
    loss = F.cross_entropy(model(images), targets)
    adamw.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
    adamw.step()
    return loss.item(), norm.item()


# ---------------------------------------------------------------------------------------------------------------------
# The same input


def as_torch(images: jax.Array) -> torch.Tensor:
    """Turn (B, H, W, C) into PyTorch's (B, C, H, W), in its default type."""
    return torch.tensor(np.asarray(images), dtype=torch.get_default_dtype()).permute(0, 3, 1, 2).contiguous()


def augmenter(config: Config, num_classes: int):
    """Return ``(step, batch) -> images, targets``, the arrays that our train step feeds its model."""

    @jax.jit
    def augment(step, image, label):
        key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
        return device.train_augment(key, image, label, config.data, num_classes=num_classes)

    def on_host(step: int, batch: loader.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = augment(step, batch["image"], batch["label"])
        return as_torch(images), torch.tensor(np.asarray(targets), dtype=torch.get_default_dtype())

    return on_host


def evaluation(config: Config) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield images, labels and weights of the evaluation split."""
    normalize = jax.jit(lambda images: device.normalize(images, config.data.mean, config.data.std))
    source = open_source(config.data, config.data.eval_split)
    with loader.eval_batches(config.data, source, global_batch=config.batch_size) as batches:
        for batch in batches:
            images = as_torch(normalize(batch["image"]))
            yield images, torch.tensor(batch["label"]).long(), torch.tensor(batch["weight"])


@torch.no_grad()
def evaluate(model: nn.Module, config: Config) -> dict[str, float]:
    """Return top-1 in per cent and the loss."""
    model.eval()
    right = loss = total = 0.0
    for images, labels, weight in evaluation(config):
        logits = model(images)
        right += ((logits.argmax(1) == labels) * weight).sum().item()
        loss += (F.cross_entropy(logits, labels, reduction="none") * weight).sum().item()
        total += weight.sum().item()
    model.train()
    return {"top1": 100 * right / total, "eval_loss": loss / total}


# ---------------------------------------------------------------------------------------------------------------------
# What the command does


def train(clone: Path, config: Config, workdir: Path) -> None:
    """Train from the official code's own initial values; write metrics.jsonl as our training does."""
    source = open_source(config.data, config.data.train_split)
    task = Classification(config, source.class_names)
    setup = Setup(task, make_mesh(config), len(source))
    report = Reporter(workdir, total_steps=setup.total_steps, steps_per_epoch=setup.steps_per_epoch, is_main=True)
    report.rewind(0)
    torch.manual_seed(config.seed)
    model = build(clone, config, len(source.class_names))
    adamw = optimizer(model, config)
    augment = augmenter(config, len(source.class_names))
    every = setup.in_steps(config.eval_every)
    window, began = [], time.perf_counter()
    with loader.train_batches(config.data, source, seed=config.seed, global_batch=config.batch_size) as batches:
        for step in range(setup.total_steps):
            rate = float(setup.schedule(step))
            window.append(update(model, adamw, config, rate, *augment(step, next(batches))))
            done = step + 1
            if done % setup.log_every == 0 or done == setup.total_steps:
                loss, norm = np.mean(window, axis=0)
                speed = {"images_per_second": len(window) * config.batch_size / (time.perf_counter() - began)}
                report.log_train(done, {"loss": loss, "lr": rate, "grad_norm": norm}, speed)
                window, began = [], time.perf_counter()
            if done % every == 0 or done == setup.total_steps:
                report.log_eval(done, evaluate(model, config))
                began = time.perf_counter()
    report.close()


def check(clone: Path, config: Config, workdir: Path, steps: int = 20) -> None:
    """Show that both sides are one model under one recipe; write check.json.

    From equal weights both make ``steps`` steps without drop path, the one thing in a step that is drawn separately.
    Only rounding is left to differ. Every step amplifies it, in float32 to a thousandth of the loss, so all is float64
    but what optax and our schedule reckon in float32: rates and the correction of the moments' bias.
    """
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)
    versions = machine.versions("Python", "jax", "jaxlib", "torch")
    environment = {"machine": machine.cpu(), "versions": versions, "date": machine.today()}
    figures: dict[str, Any] = {"environment": environment, "scan": scan_error()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path_rate=0.0, dtype="float64"))
    source = open_source(config.data, config.data.train_split)
    task = Classification(config, source.class_names)
    setup = Setup(task, make_mesh(config), len(source))
    state = jax.tree.map(as_double, setup.first_state())
    train_step = jax.jit(setup.step()[0])
    ours = task.build_model()
    peer = build(clone, config, len(source.class_names))
    peer.load_state_dict(official_weights(state, ours))
    adamw = optimizer(peer, config)
    augment = augmenter(config, len(source.class_names))

    losses, norms = [], []
    with loader.train_batches(config.data, source, seed=config.seed, global_batch=config.batch_size) as batches:
        rows = [next(batches) for _ in range(steps)]
    for step, batch in enumerate(rows):
        state = train_step(state, task.global_batch(batch))
        theirs = update(peer, adamw, config, float(setup.schedule(step)), *augment(step, batch))
        losses.append((float(state.last["loss"]), theirs[0]))
        norms.append((float(state.last["grad_norm"]), theirs[1]))
    figures["steps"] = steps
    figures["loss"] = max(abs(a - b) for a, b in losses)
    figures["grad_norm"] = max(abs(a - b) / b for a, b in norms)

    trained, by_itself = official_weights(state, ours), peer.state_dict()
    apart = {
        name: relative(by_itself[name].numpy(), wanted.numpy())
        for name, wanted in trained.items()
        if not name.endswith("num_batches_tracked")
    }
    figures["furthest"] = max(apart, key=lambda name: apart[name])
    figures["weights"] = apart[figures["furthest"]]
    peer.load_state_dict(trained)
    peer.eval()
    images, _, _ = next(evaluation(config, task))
    graphdef, *arrays = split(ours)
    logits = jax.jit(lambda x: merge(graphdef, *arrays)(x))(jnp.asarray(images.permute(0, 2, 3, 1).numpy()))
    with torch.no_grad():
        figures["logits"] = float(np.abs(np.asarray(logits) - peer(images).numpy()).max())
    figures["parameters"] = sum(p.numel() for p in peer.parameters())

    print(json.dumps(figures))
    # A weight in the wrong group, decayed or not, would end 6e-5 apart.
    for name, limit in {"scan": 1e-12, "logits": 1e-10, "loss": 1e-5, "grad_norm": 1e-5, "weights": 2e-5}.items():
        if not figures[name] < limit:
            raise SystemExit(f"error: the two sides differ: {name} by {figures[name]:.2g}, allowed {limit:g}")
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "check.json").write_text(json.dumps(figures))


def as_double(array: jax.Array) -> jax.Array:
    """Turn float32 into float64, and leave everything else."""
    return array.astype(jnp.float64) if array.dtype == jnp.float32 else array


def official_weights(state, ours) -> dict[str, torch.Tensor]:
    """Put the weights of a train state into our model and return them by their official names."""
    fill(ours, **state.model.asdict())
    return {name: torch.tensor(array) for name, array in to_torch(ours).items()}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest error over the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def scan_error() -> float:
    """Return the largest error of ``Scan`` against pallas_kernels: output and gradients, over their largest values."""
    rng = np.random.default_rng(0)
    batch, channels, length, groups, state = 20, 24, 33, 4, 16
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    u, delta, dy = (draw(batch, channels, length) for _ in range(3))
    A = -np.exp(draw(channels, state))
    B, C = (draw(batch, groups, state, length) for _ in range(2))
    D, bias = draw(channels), draw(channels)

    last = lambda x: np.moveaxis(x, 1, -1)  # noqa: E731  # channels
    rows = lambda x: x.transpose(0, 3, 1, 2)  # noqa: E731  # (B, G, N, L) to (B, L, G, N)
    scan = lambda u, delta, A, B, C, D, bias: selective_scan(  # noqa: E731
        u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True
    )
    y, pull = jax.vjp(scan, last(u), last(delta), A, rows(B), rows(C), D, bias)
    du, ddelta, dA, dB, dC, dD, dbias = pull(jnp.asarray(last(dy)))
    back = lambda x: np.moveaxis(x, -1, 1)  # noqa: E731
    wanted = [back(y), back(du), back(ddelta), dA, *(np.transpose(x, (0, 2, 3, 1)) for x in (dB, dC)), dD, dbias]

    given = [torch.tensor(x) for x in (u, delta, A, B, C, D, bias)]
    found, states = Scan.fwd(*given, True, 1)
    gradients = Scan.bwd(*given, torch.tensor(dy), states, True, 1)
    return max(relative(x.numpy(), np.asarray(w)) for x, w in zip((found, *gradients), wanted, strict=True))


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[2] not in ("check", "train"):
        raise SystemExit(__doc__)
    clone, command, *rest = sys.argv[1:]
    config, workdir = parse_command([sys.argv[0], *rest])
    torch.set_num_threads(1)  # the operations are small: threads would mostly wait for each other
    {"check": check, "train": train}[command](Path(clone), config, workdir)


if __name__ == "__main__":
    main()
