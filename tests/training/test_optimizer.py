"""Schedules, decay rules and update against the formulas of the official trainers, and recordings of timm's."""

import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evmamba_jax.arrays import split
from evmamba_jax.detection import create_detector
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.segmentation import create_segmenter
from evmamba_jax.training.config import Config, Duration, OptimConfig
from evmamba_jax.training.optimizer import decay_mask, decayed_by, learning_rate, make_optimizer

RELEASED = OptimConfig(lr=2e-3, min_lr=1e-6, warmup_lr=1e-7, warmup=Duration(epochs=20), lr_changes="warmup_epoch")


@pytest.mark.parametrize("step", [0, 624, 625, 6249, 6250, 12499, 12500, 12501, 100_000, 187_499])
def test_released_schedule_stands_still_within_warm_up_epochs(step):
    # 625 steps an epoch, 300 epochs: the numbers of the released logs.
    schedule = learning_rate(RELEASED, total_steps=187_500, steps_per_epoch=625)
    if step < 12_500:
        expected = 1e-7 + (2e-3 - 1e-7) * (step // 625) / 20
    else:
        expected = 1e-6 + (2e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * (step - 12_500) / 175_000))
    np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=2e-5, atol=3e-10)


@pytest.mark.parametrize("step", [0, 1, 499, 1000, 1500, 2999])
def test_readme_schedule_warms_up_step_by_step(step):
    config = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup=Duration(steps=1000), lr_changes="step")
    schedule = learning_rate(config, total_steps=3000, steps_per_epoch=100)
    if step < 1000:
        expected = 1e-6 + (1e-3 - 1e-6) * step / 1000
    else:
        expected = 1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * (step - 1000) / 2000))
    np.testing.assert_allclose(schedule(jnp.int32(step)), expected, rtol=2e-5)


RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "training" / "optim.json").read_text())


def test_vim_schedule_is_that_of_timm_called_after_each_epoch():
    config = OptimConfig(
        lr=1e-3,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup=Duration(epochs=5),
        warmup_prefix=False,
        lr_changes="epoch",
    )
    schedule = learning_rate(config, total_steps=30 * 7, steps_per_epoch=7)
    ours = [float(schedule(jnp.int32(step))) for step in range(30 * 7)]
    np.testing.assert_allclose(ours, np.repeat(RECORDED["vim"], 7), rtol=2e-5)
    assert len(RECORDED["vim"]) == 30


def test_mambavision_schedule_is_that_of_timm_called_after_each_update():
    config = OptimConfig(
        lr=5e-3,
        min_lr=5e-6,
        warmup_lr=1e-6,
        warmup=Duration(epochs=4),
        warmup_prefix=False,
        cooldown=Duration(epochs=3),
        lr_changes="step",
    )
    schedule = learning_rate(config, total_steps=34 * 5, steps_per_epoch=5)
    ours = [float(schedule(jnp.int32(step))) for step in range(34 * 5)]
    np.testing.assert_allclose(ours, RECORDED["mambavision"], rtol=2e-5, atol=3e-10)


def mmengine(schedulers, base, *, steps, steps_per_epoch):
    """Return the rate of every iteration as mmengine's schedulers change it in place, one after another."""
    lr, rates = base, []
    states = [{"global": -1, "last": -1, **one} for one in schedulers]

    def step(one):
        nonlocal lr
        one["global"] += 1
        if one["begin"] <= one["global"] < one["end"]:
            one["last"] += 1
            lr = one["value"](lr, one["last"], one["end"] - one["begin"] - 1)

    for one in states:  # each is stepped once when it is made
        step(one)
    for iteration in range(steps):
        rates.append(lr)
        for one in states:
            if not one["by_epoch"]:
                step(one)
        for one in states:
            if one["by_epoch"] and (iteration + 1) % steps_per_epoch == 0:
                step(one)
    return rates


def linear_lr(start, end):
    def value(lr, last, total):
        return lr * start if last == 0 else lr * (1 + (1 - start) / (total * start + (last - 1) * (1 - start)))

    return {"begin": 0, "end": end, "by_epoch": False, "value": value}


def poly_lr(begin, end, eta_min):
    def value(lr, last, total):
        return lr if last == 0 else (lr - eta_min) * (1 - 1 / (total - last + 1)) + eta_min

    return {"begin": begin, "end": end, "by_epoch": False, "value": value}


def multi_step_lr(*milestones):
    return {"begin": 0, "end": 10**9, "by_epoch": True, "value": lambda lr, last, _: lr * 0.1 ** milestones.count(last)}


def rates_of(config, *, steps, steps_per_epoch):
    schedule = learning_rate(config, total_steps=steps, steps_per_epoch=steps_per_epoch)
    return [float(schedule(jnp.int32(step))) for step in range(steps)]


@pytest.mark.parametrize(("start", "min_lr", "warmup"), [(1e-6, 0.0, 15), (0.001, 2e-6, 2), (0.5, 0.0, 59)])
def test_poly_is_mmengines_linear_and_poly_in_a_row(start, min_lr, warmup):
    config = OptimConfig(
        schedule="poly",
        lr=6e-5,
        min_lr=min_lr,
        warmup_lr=start * 6e-5,
        warmup=Duration(steps=warmup),
        lr_changes="step",
    )
    official = mmengine([linear_lr(start, warmup), poly_lr(warmup, 60, min_lr)], 6e-5, steps=60, steps_per_epoch=7)
    np.testing.assert_allclose(rates_of(config, steps=60, steps_per_epoch=7), official, rtol=2e-6, atol=1e-11)
    assert official[warmup - 1] == pytest.approx(6e-5)
    if warmup < 59:
        assert official[-1] == pytest.approx(min_lr, abs=1e-15)  # the last iteration has it already


@pytest.mark.parametrize("warmup", [3, 20])  # within the first epoch, and beyond a milestone
def test_milestones_are_mmengines_multi_step_under_its_warm_up(warmup):
    config = OptimConfig(
        schedule="milestones",
        milestones=(2.0, 3.0, 5.0),
        lr=1e-4,
        warmup_lr=1e-7,
        warmup=Duration(steps=warmup),
        lr_changes="step",
    )
    official = mmengine([linear_lr(0.001, warmup), multi_step_lr(2, 3, 5)], 1e-4, steps=48, steps_per_epoch=8)
    np.testing.assert_allclose(rates_of(config, steps=48, steps_per_epoch=8), official, rtol=2e-6)
    assert official[39] / official[40] == pytest.approx(10)  # after five finished epochs


def test_poly_without_prefix_is_mmcvs_hook():
    config = OptimConfig(
        schedule="poly",
        lr=2e-4,
        min_lr=0.0,
        warmup_lr=2e-10,
        warmup=Duration(steps=15),
        warmup_prefix=False,
        lr_changes="step",
    )
    official = []
    for iteration in range(60):
        rate = 2e-4 * (1 - iteration / 60)
        if iteration < 15:
            rate *= 1 - (1 - iteration / 15) * (1 - 1e-6)
        official.append(rate)
    np.testing.assert_allclose(rates_of(config, steps=60, steps_per_epoch=7), official, rtol=2e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "milestones"}, r"schedule is 'milestones' and milestones \(\): name some"),
        ({"milestones": (8.0,)}, r"schedule is 'cosine' and milestones \(8.0,\): .* none with another"),
        (
            {"schedule": "milestones", "milestones": (8.0,), "cooldown": Duration(epochs=1)},
            "there is none: set it to 0",
        ),
        ({"schedule": "step"}, "schedule='step' is not allowed"),
        ({"no_decay": "norm"}, "no_decay='norm' is not allowed"),
    ],
)
def test_mistakes_in_the_schedule_get_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        Config(optim=OptimConfig(**fields)).validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_updates_are_those_recorded(name):
    config = OptimConfig(name=name, clip_norm=5.0, weight_decay=0.05)
    tx = make_optimizer(config, lambda step: 1e-2)
    names = ("a.kernel", "a.bias")
    params = dict(zip(names, map(jnp.float32, RECORDED["start"]), strict=True))
    state = tx.init(params)
    for gradients, expected in zip(RECORDED["gradients"], RECORDED[name], strict=True):
        updates, state = tx.update(dict(zip(names, map(jnp.float32, gradients), strict=True)), state, params)
        params = {key: params[key] + updates[key] for key in names}
        for key, value in zip(names, expected, strict=True):
            np.testing.assert_allclose(params[key], value, rtol=2e-5, atol=2e-6)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match=r"config.optim.warmup lasts 200 steps and the whole run 150"):
        learning_rate(RELEASED, total_steps=150, steps_per_epoch=10)
    config = OptimConfig(warmup=Duration(steps=50), cooldown=Duration(steps=50))
    with pytest.raises(UserError, match=r"the whole run 100, of which 50 are its cool-down"):
        learning_rate(config, total_steps=100, steps_per_epoch=10)


def test_decay_touches_what_the_official_trainers_decay():
    params = split(abstract_model("evmamba_t")).params
    mask = decay_mask(params)
    block = "stages.0.blocks.0."
    decayed = (
        "op.scan.A_log",
        "op.scan.dt_bias",
        "op.scan.x_proj",
        "op.scan.dt_proj",
        "op.in_proj.kernel",
        "op.conv2d.kernel",
    )
    spared = ("op.scan.D", "norm.scale", "norm.bias", "op.conv2d.bias", "conv_branch.norm.scale", "se.reduce.bias")
    assert all(mask[block + name] for name in decayed)
    assert not any(mask[block + name] for name in spared)
    # The official rule is about 1-D tensors; the only ones of ours that are 1-D there and not here are the D.
    for name, decays in mask.items():
        assert decays == (len(params[name].shape) > 1 and not name.endswith(".D")), name


SMALL = {"width": 8, "depths": (1, 1, 1, 1)}
# Which of our paths have "norm" in their official names; written off the modules of the official repositories. There a
# norm within nn.Sequential has only a number, as all stems and VMamba's downsampling, and those of the heads are "bn".
NORMS = {
    "evmamba_t": (SMALL, r"stages\.[01]\.blocks\.0\.((op\.out_|se\.)?norm)|stages\.\d\.downsample\.norm"),
    "vmamba_t": (SMALL, r"stages\.\d\.blocks\.0\.(norm2?|mixer\.out_norm)"),
    "msvmamba_n": (SMALL, r"stages\.\d\.(blocks\.0\.(norm2?|mixer\.out_norm)|downsample\.norm)"),
    "mambavision_t": (
        SMALL | {"num_heads": (1, 1, 2, 2), "depths": (1, 1, 2, 2)},
        r"stages\.\d\.blocks\.\d\.norm[12]?",
    ),
    "vim_t": ({"width": 8, "depth": 4}, r"(blocks\.\d\.)?norm"),
}


@pytest.mark.parametrize("backbone", NORMS)
def test_norm_names_spares_what_the_official_names_say(backbone):
    options, pattern = NORMS[backbone]
    model = nnx.eval_shape(
        lambda: create_segmenter("upernet", backbone=backbone, width=8, aux_width=8, backbone_options=options)
    )
    params = split(model).params
    mask = decayed_by(OptimConfig(no_decay="norm_names"), model)(params)
    spared = rf"backbone\.({pattern}|out_norms\.\d)\.(scale|bias)"
    assert {name for name in params if not mask[name]} == {name for name in params if re.fullmatch(spared, name)}
    assert not all(mask.values())
    assert mask["decode_head.fuse.norm.scale"]
    assert mask["decode_head.classifier.conv.bias"]


def test_norm_names_spares_nothing_of_a_detectors_heads():
    model = nnx.eval_shape(lambda: create_detector("retinanet", backbone="evmamba_t", width=8, backbone_options=SMALL))
    params = split(model).params
    mask = decayed_by(OptimConfig(no_decay="norm_names"), model)(params | {"head.cls.kernel.lora_a": None})
    assert all(decays for name, decays in mask.items() if not name.startswith("backbone."))
    assert not mask["backbone.out_norms.3.scale"]
    assert all(decayed_by(OptimConfig(no_decay="nothing"), model)(params).values())


def test_vectors_spares_a_position_embedding_by_its_whole_name_alone():
    # Vim's constructor for segmenters compares "backbone.pos_embed" with "pos_embed".
    mask = decay_mask({name: np.zeros((1, 2, 3)) for name in ("pos_embed", "cls_token", "backbone.pos_embed")})
    assert mask == {"pos_embed": False, "cls_token": False, "backbone.pos_embed": True}


def test_norm_names_needs_official_names():
    with pytest.raises(UserError, match=r"no_decay='norm_names' goes by official names, but .*ssm='s4d' has no"):
        decayed_by(OptimConfig(no_decay="norm_names"), abstract_model("mambavision_t", ssm="s4d"))


def test_update_equals_adamw_written_out():
    config = OptimConfig(clip_norm=1.0, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    rate = 0.01
    tx = make_optimizer(config, lambda step: rate)
    rng = np.random.default_rng(0)
    params = {"a.kernel": rng.normal(size=(3, 4)), "a.bias": rng.normal(size=4)}
    state = tx.init({k: jnp.float32(v) for k, v in params.items()})
    expected = {k: v.copy() for k, v in params.items()}
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    ours = {k: jnp.float32(p) for k, p in params.items()}
    for t in range(1, 6):
        grads = {k: rng.normal(size=p.shape) * 3 for k, p in params.items()}
        updates, state = tx.update({k: jnp.float32(g) for k, g in grads.items()}, state, ours)
        ours = {k: ours[k] + updates[k] for k in ours}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1, 1 / norm)
            m[k] = 0.8 * m[k] + 0.2 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            decay = 0.1 if k == "a.kernel" else 0
            step = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-6)
            expected[k] = expected[k] - rate * decay * expected[k] - rate * step
    for k in ours:
        np.testing.assert_allclose(ours[k], expected[k], rtol=1e-5, atol=1e-6)
