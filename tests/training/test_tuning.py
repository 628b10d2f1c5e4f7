"""What is trained of a model: frozen parts, thin matrices, rates by layer; compared with timm and with NumPy."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import refused_here, run_here
from flax import nnx
from jax.sharding import Mesh
from tiny import get_config

from evmamba_jax import lora
from evmamba_jax.arrays import split
from evmamba_jax.checkpoints import load_model
from evmamba_jax.config import TuneConfig
from evmamba_jax.detection import create_detector
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.tasks.classification import Classification
from evmamba_jax.tasks.detection import Detection
from evmamba_jax.training.setup import Setup
from evmamba_jax.training.tuning import layer_numbers, tuning
from evmamba_jax.weights.load import open_place

GOLDEN = Path(__file__).parents[1] / "golden" / "training"
HEAD = "head.*"


@pytest.fixture(scope="module")
def params():
    return split(abstract_model("evmamba_t", width=16, depths=(1, 1, 1, 1), num_classes=10)).params


@pytest.mark.parametrize("name", ["vmamba_t", "vim_t", "mambavision_t"])
def test_layers_are_those_of_timm(name):
    """Stem, blocks in order, a downsampling with the block after it, the last norm with the last block, the head."""
    numbers = layer_numbers(split(abstract_model(name)).params, head=HEAD)
    blocks = 24 if name == "vim_t" else sum(len(stage.blocks) for stage in abstract_model(name).stages)
    assert numbers["head.kernel"] == blocks + 1
    assert numbers["norm.scale"] == blocks
    assert sorted(set(numbers.values())) == list(range(blocks + 2))
    stem = "patch_embed.kernel" if name == "vim_t" else "patch_embed.norm1.scale"
    assert numbers[stem] == 0
    if name == "vmamba_t":
        assert numbers["stages.0.downsample.conv.kernel"] == numbers["stages.1.blocks.0.norm.scale"] == 3


def test_layers_of_a_backbone_with_heads():
    """The backbone's own, and all that stands on it above them."""
    own = layer_numbers(split(abstract_model("vmamba_t", num_classes=0, out_norms=True)).params, head=HEAD)
    detector = nnx.eval_shape(lambda: create_detector("retinanet", backbone="vmamba_t"))
    numbers = layer_numbers(split(detector).params, head=Detection.head)
    for name, number in numbers.items():
        assert number == own.get(name.removeprefix("backbone."), max(own.values()) + 1), name
    assert numbers["neck.laterals.0.kernel"] == max(numbers.values()) > numbers["backbone.out_norms.3.scale"] > 0


def test_rates_fall_as_timms_do():
    """``layer_decay`` recorded from timm's param_groups_layer_decay over names like ours."""
    recorded = json.loads((GOLDEN / "optim.json").read_text())["layer_decay"]
    shapes = {name: jax.ShapeDtypeStruct((2, 2), jnp.float32) for name in recorded["scales"]}
    found = tuning(TuneConfig(layer_decay=recorded["decay"]), shapes, head=HEAD)
    assert found.scales == pytest.approx(recorded["scales"], rel=1e-12)


def test_embeddings_have_a_rate_of_their_own():
    names = [
        "patch_embed.kernel",
        "pos_embed",
        "cls_token",
        "blocks.0.norm.scale",
        "blocks.0.patch_embedding",
        "head.bias",
    ]
    names += [f"backbone.{name}" for name in names[:3]]
    shapes = {name: jax.ShapeDtypeStruct((2, 2), jnp.float32) for name in names}
    found = tuning(TuneConfig(embed_lr=0.2, head_lr=3.0), shapes, head=HEAD)
    assert list(found.scales.values()) == [0.2, 0.2, 0.2, 1.0, 1.0, 3.0, 0.2, 0.2, 0.2]


def test_patterns_that_match_nothing_and_nothing_left(params):
    with pytest.raises(UserError, match=r"freeze has 'stage.0.\*', .* no parameter; near it are stages\.0\.\*"):
        tuning(TuneConfig(freeze=("stage.0.*",)), params, head=HEAD)
    with pytest.raises(UserError, match="leaves nothing to train"):
        tuning(TuneConfig(freeze=("*",)), params, head=HEAD)
    with pytest.raises(UserError, match="leaves nothing to train"):
        tuning(TuneConfig(method="head", freeze=("head.*",)), params, head=HEAD)
    with pytest.raises(UserError, match=r"lora_targets has 'qkv', which is the path of no linear layer"):
        lora.chosen(params, ("qkv",))


def test_thin_matrices_start_as_nothing_and_add_their_product():
    rng = np.random.default_rng(0)
    given = {"a.kernel": rng.normal(size=(6, 4)).astype(np.float32), "b.x_proj": np.ones((2, 6, 3), np.float32)}
    given["a.bias"] = np.ones(4, np.float32)
    more = lora.added(given, list(given)[:2], rank=2, alpha=4.0, seed=0)
    assert {n: a.shape for n, a in more.items() if n not in given} == {
        **{"a.kernel.lora_a": (6, 2), "a.kernel.lora_b": (2, 4), "a.kernel.lora_scale": ()},
        **{"b.x_proj.lora_a": (2, 6, 2), "b.x_proj.lora_b": (2, 2, 3), "b.x_proj.lora_scale": ()},
    }
    assert abs(more["a.kernel.lora_a"]).max() <= 1 / np.sqrt(6)
    for name, array in lora.merged(more).items():
        np.testing.assert_array_equal(array, given[name])
    more["b.x_proj.lora_b"] = rng.normal(size=(2, 2, 3)).astype(np.float32)
    product = np.einsum("kir,kro->kio", more["b.x_proj.lora_a"], more["b.x_proj.lora_b"])
    np.testing.assert_allclose(lora.merged(more)["b.x_proj"], 1 + 2 * product, rtol=1e-6)


SHORT = (
    *("--config.duration.steps=6", "--config.eval_every.steps=6", "--config.save_every.steps=6"),
    *("--config.optim.warmup.steps=2", "--config.optim.lr=0.05", "--config.optim.weight_decay=0.1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"--config.data.data_dir={tmp_path_factory.mktemp('data')}"


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """A run of one step, which the others start from."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    few = ("--config.duration.steps=2", "--config.optim.warmup.steps=1")
    code, out, err = run_here(data, *few, "--workdir", workdir)
    assert code == 0, out + err
    return workdir


def tuned(data, first, workdir, *arguments):
    """Train on from the first run; return the parameters before and after, all statistics alike, and what was said."""
    code, out, err = run_here(data, *SHORT, f"--config.init_from={first}", "--workdir", workdir, *arguments)
    assert code == 0, out + err
    return load_model(first)[:2], load_model(workdir)[:2], out


def changed(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


def state_names(workdir):
    (step,) = (workdir / "checkpoints").glob("6")
    return (step / "train" / "_METADATA").read_text()


def test_a_linear_probe_changes_the_head_alone(data, first, tmp_path):
    before, after, out = tuned(data, first, tmp_path / "run", "--config.tune.method=head")
    assert changed(before[0], after[0]) == {"head.kernel", "head.bias"}
    assert not changed(before[1], after[1])  # batch statistics
    assert "training 650 of 27,635 parameters (tune.method='head')\n" in out
    names = state_names(tmp_path / "run")
    assert "head.kernel" in names
    assert "patch_embed" not in names  # the optimizer has no place for what is frozen
    average = load_model(tmp_path / "run", ema=True)[0]
    assert changed(before[0], average) == {"head.kernel", "head.bias"}


def test_frozen_patterns_keep_their_bits(data, first, tmp_path):
    before, after, _ = tuned(data, first, tmp_path / "run", "--config.tune.freeze=patch_embed.*,stages.2.*")
    kept = set(before[0]) - changed(before[0], after[0])
    assert kept == {name for name in before[0] if name.startswith(("patch_embed.", "stages.2."))}
    assert not any(name.startswith("stages.2.") for name in changed(before[1], after[1]))


def test_lora_is_merged_where_the_model_is_read(data, first, tmp_path):
    workdir = tmp_path / "run"
    before, after, _ = tuned(data, first, workdir, "--config.tune.method=lora", "--config.tune.lora_rank=2")
    thin = {name for name in after[0] if name.endswith((".lora_a", ".lora_b", ".lora_scale"))}
    assert changed(before[0], after[0]) == {"head.kernel", "head.bias"}  # W itself stays
    merged = open_place(workdir, ema=False).weights.params
    assert set(merged) == set(before[0])
    a, b = (after[0][f"stages.0.blocks.0.op.in_proj.kernel.lora_{x}"] for x in "ab")
    wanted = before[0]["stages.0.blocks.0.op.in_proj.kernel"] + 16 / 2 * a @ b
    np.testing.assert_allclose(merged["stages.0.blocks.0.op.in_proj.kernel"], wanted, rtol=1e-6)
    assert abs(b).max() > 0
    assert thin
    # The run's own evaluation, which adds the products in its step, is the evaluation of the merged weights.
    said = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    again = ("--config.eval_only=True", f"--config.init_from={workdir}", "--workdir", tmp_path / "again")
    code, out, err = run_here(data, *again)
    assert code == 0, out + err
    assert f"top-1 {said['top1']:.2f} %, top-5 {said['top5']:.2f} %" in out


def test_a_tuned_run_resumes_to_the_bit(data, first, tmp_path):
    arguments = ("--config.tune.method=lora", "--config.tune.layer_decay=0.7", "--config.optim.ema_warmup=True")
    often = ("--config.save_every.steps=3",)
    tuned(data, first, tmp_path / "whole", *arguments, *often)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")  # as if it had been killed there
    tuned(data, first, tmp_path / "cut", *arguments, *often)
    for ema in (False, True):
        whole, cut = (load_model(tmp_path / name, ema=ema)[0] for name in ("whole", "cut"))
        assert not changed(whole, cut)


def test_frozen_parts_keep_no_activations():
    """The compiled step of a linear probe needs memory for one block at a time, that of a full one for all of them."""
    needed = {}
    for method in ("full", "head"):
        config = get_config()
        config.batch_size, config.model.options["depths"] = 64, (4, 0, 0, 0)
        config.tune.method = method
        task = Classification(config, [str(k) for k in range(10)])
        compiled = (
            Setup(task, Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")), 1437).lower().compile()
        )
        needed[method] = compiled.memory_analysis().temp_size_in_bytes
    assert needed["head"] < 0.45 * needed["full"], needed


def test_bad_values_get_one_line(data, first, tmp_path):
    said = refused_here(data, f"--config.init_from={first}", "--config.tune.freeze=stem.*", "--workdir", tmp_path / "a")
    assert "config.tune.freeze has 'stem.*'" in said
    said = refused_here(data, "--config.tune.layer_decay=1.5", "--workdir", tmp_path / "b")
    assert "config.tune.layer_decay=1.5 is not allowed: it must be above 0, up to 1" in said
