"""Record learning rates and updates of timm and of PyTorch, of small runs, in optim.json.

Not run by the tests. In an environment of its own, with `pip install timm`:

    python tests/golden/training/make_optim.py

`vim` holds the rate of each epoch, `mambavision` that of each step, as the trainers of those models call timm's
scheduler. `adamw` and `lamb` hold two parameters after each of six updates with the gradients in `gradients`; the first
parameter is decayed, the second is not. `layer_decay` holds the factor of the learning rate that timm gives to each of
some names, of a model whose layers it groups as those of its Swin transformer. `losses` holds timm's binary
cross-entropy and PyTorch's weighted cross-entropy of the same logits. `versions` says by what.
"""

import json
from pathlib import Path

import timm
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import Lamb, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler

torch.manual_seed(0)


def a_parameter():
    return torch.nn.Parameter(torch.zeros(1))


def vim(epochs=30):
    """DeiT's loop: one epoch, then ``step(epoch)``."""
    optimizer = torch.optim.AdamW([a_parameter()], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, epochs, lr_min=1e-5, warmup_lr_init=1e-6, warmup_t=5)
    for epoch in range(epochs):
        yield optimizer.param_groups[0]["lr"]
        scheduler.step(epoch)


def mambavision(epochs=31, warmup=4, cooldown=3, updates=5):
    """timm's loop, where the number of updates decides: ``step_update`` after each."""
    optimizer = torch.optim.AdamW([a_parameter()], lr=5e-3)
    scheduler = CosineLRScheduler(
        optimizer,
        epochs * updates,
        lr_min=5e-6,
        warmup_lr_init=1e-6,
        warmup_t=warmup * updates,
        cycle_limit=1,
        t_in_epochs=False,
    )
    for update in range((epochs + cooldown) * updates):
        yield optimizer.param_groups[0]["lr"]
        scheduler.step_update(update + 1)


START = torch.randn(3, 4), torch.randn(4)
GRADIENTS = [(3 * torch.randn(3, 4), torch.randn(4)) for _ in range(6)]


def updates(make):
    parameters = [torch.nn.Parameter(p.clone()) for p in START]
    groups = [{"params": parameters[:1], "weight_decay": 0.05}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = make(groups)
    for gradients in GRADIENTS:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        yield [p.tolist() for p in parameters]


NAMES = [
    *("patch_embed.conv1.kernel", "patch_embed.norm1.scale", "head.kernel", "head.bias", "norm.scale"),
    *(f"stages.{i}.blocks.{j}.{leaf}.kernel" for i, j in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)) for leaf in "ab"),
    *("stages.0.downsample.conv.kernel", "stages.1.downsample.conv.kernel"),
]


def theirs(name):
    """A downsampling that ends our stage begins the next one there."""
    return name.replace("1.down", "2.down").replace("0.down", "1.down")


class Named(torch.nn.Module):
    """Parameters of such names, grouped as timm groups those of its Swin transformer."""

    def __init__(self):
        super().__init__()
        self.made = {theirs(name): torch.nn.Parameter(torch.zeros(2, 2)) for name in NAMES}

    def named_parameters(self, *_, **__):
        return iter(self.made.items())

    def group_matcher(self, coarse=False):
        blocks = [
            (r"^stages\.(\d+).downsample", (0,)),
            (r"^stages\.(\d+)\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}


def layer_decay(decay=0.7):
    model = Named()
    groups = param_groups_layer_decay(model, layer_decay=decay)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {"decay": decay, "scales": {name: scales[id(model.made[theirs(name)])] for name in NAMES}}


def losses(classes=5, batch=4):
    logits = 3 * torch.randn(batch, classes, dtype=torch.float64)
    labels = torch.randint(classes, (batch,))
    weights = torch.rand(classes, dtype=torch.float64) + 0.5
    soft = torch.softmax(torch.randn(batch, classes, dtype=torch.float64), 1)
    return {
        "logits": logits.tolist(),
        "labels": labels.tolist(),
        "weights": weights.tolist(),
        "soft": soft.tolist(),
        "bce": BinaryCrossEntropy(smoothing=0.1)(logits, labels).item(),
        "bce_soft": BinaryCrossEntropy(smoothing=0.1)(logits, soft).item(),
        "bce_weighted": BinaryCrossEntropy(smoothing=0.0, weight=weights)(logits, soft).item(),
        "cross_entropy_weighted": torch.nn.functional.cross_entropy(logits, soft, weight=weights).item(),
    }


recorded = {
    "vim": list(vim()),
    "mambavision": list(mambavision()),
    "start": [p.tolist() for p in START],
    "gradients": [[g.tolist() for g in pair] for pair in GRADIENTS],
    "adamw": list(updates(lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-8))),
    "lamb": list(updates(lambda groups: Lamb(groups, lr=1e-2, eps=1e-8))),
    "layer_decay": layer_decay(),
    "losses": losses(),
    "versions": {"timm": timm.__version__, "torch": torch.__version__},
}
Path(__file__).with_name("optim.json").write_text(json.dumps(recorded) + "\n")
