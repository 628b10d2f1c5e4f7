"""Record learning rates and updates of timm and of PyTorch, of small runs, in optim.json.

Not run by the tests. In an environment of its own, with `pip install timm`:

    python tests/golden/training/make_optim.py

`vim` holds the rate of each epoch, `mambavision` that of each step, as the trainers of those models call timm's
scheduler. `adamw` and `lamb` hold two parameters after each of six updates with the gradients in `gradients`; the first
parameter is decayed, the second is not. `versions` says by what.
"""

import json
from pathlib import Path

import timm
import torch
from timm.optim import Lamb
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


recorded = {
    "vim": list(vim()),
    "mambavision": list(mambavision()),
    "start": [p.tolist() for p in START],
    "gradients": [[g.tolist() for g in pair] for pair in GRADIENTS],
    "adamw": list(updates(lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-8))),
    "lamb": list(updates(lambda groups: Lamb(groups, lr=1e-2, eps=1e-8))),
    "versions": {"timm": timm.__version__, "torch": torch.__version__},
}
Path(__file__).with_name("optim.json").write_text(json.dumps(recorded) + "\n")
