"""from_torch and the convert command: every name used once, every parameter filled, mistakes named."""

import functools

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from official_outputs import MODELS, abstract, facts
from official_weights import manifest, weights, weights_of
from safetensors.numpy import load_file, save_file

from evmamba_jax import create_model, list_models
from evmamba_jax.arrays import merge, split
from evmamba_jax.checkpoints import Checkpoints, load_model, save_model
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model
from evmamba_jax.weights import from_torch, open_model, to_torch
from evmamba_jax.weights.__main__ import main
from evmamba_jax.weights.convert import table
from pallas_kernels import Order

SMALL = {"width": 16, "depths": (1, 2, 1, 3), "num_classes": 5, "d_state": 2}


traced = functools.cache(abstract_model)  # once a module: tracing is most of what these tests take


def small(**options):
    return merge(*split(traced("evmamba_t", **SMALL | options)))


def arrays_of(model):
    _, params, batch_stats = split(model)
    return {**params, **batch_stats}


@pytest.mark.parametrize("name", MODELS)
def test_official_weights_go_there_and_back_to_the_bit(name):
    official = weights(facts(MODELS[name])["state_dict"])
    model = abstract(name)
    from_torch(model, official)
    back = to_torch(model)
    assert set(back) == set(official)
    for key, array in official.items():
        if key.endswith("num_batches_tracked"):
            assert back[key] == 0
        else:
            chex.assert_trees_all_equal(back[key], array)


BACKBONES = ["evmamba_t", "vmamba_t", "vmamba_t_v0", "msvmamba_n", "msvmamba_t_v2", "mambavision_t"]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in list_models()), *((name, {"out_norms": True}) for name in BACKBONES)]
)
def test_every_parameter_of_every_model_has_one_official_name(name, options):
    model = abstract(name, **options)
    ours = arrays_of(model)
    rows = [row for row in table(model) if row.ours in ours]
    assert sorted(row.ours for row in rows) == sorted(ours)
    assert len({row.official for row in rows}) == len(rows)


def test_a_backbone_takes_its_own_weights_and_those_of_a_classifier():
    backbone, classifier = small(out_norms=True), small()
    own = weights_of(backbone)
    assert {name for name in own if name.startswith(("outnorm", "classifier"))} == {
        f"outnorm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    }
    from_torch(backbone, own)
    chex.assert_trees_all_equal({k: v for k, v in to_torch(backbone).items() if k in own}, own)

    official = weights_of(classifier)
    from_torch(backbone, official)
    arrays = arrays_of(backbone)
    assert all((arrays[f"out_norms.{i}.scale"] == 1).all() for i in range(4))
    assert all((arrays[f"out_norms.{i}.bias"] == 0).all() for i in range(4))
    chex.assert_trees_all_equal(
        np.asarray(arrays["stages.3.blocks.2.pw2.kernel"]), official["layers.3.3.conv_pw2.0.weight"][:, :, 0, 0].T
    )


def test_a_backbone_reads_the_checkpoint_of_a_classifier(tmp_path):
    classifier = small()
    from_torch(classifier, weights_of(classifier))
    _, params, batch_stats = split(classifier)
    save_model(tmp_path / "saved", params=params, batch_stats=batch_stats, meta={})
    backbone = create_model("evmamba_t", **SMALL, out_norms=True, pretrained=tmp_path / "saved")
    arrays = arrays_of(backbone)
    shared = {path for path in params if not path.startswith(("norm.", "head."))}
    chex.assert_trees_all_equal({path: arrays[path] for path in shared}, {path: params[path] for path in shared})
    assert (arrays["out_norms.2.scale"] == 1).all()


def test_a_model_with_orders_of_its_own_goes_there_and_back():
    orders = (Order(), Order(reverse=True), Order(column_major=True))
    model, again = (
        abstract_model("vmamba_t", width=8, depths=(0, 1, 0, 0), num_classes=3, scan=orders) for _ in range(2)
    )
    assert weights_of(model)["layers.1.blocks.0.op.A_logs"].shape == (3 * 16, 1)
    from_torch(model, weights_of(model))
    from_torch(again, to_torch(model))
    chex.assert_trees_all_equal(arrays_of(again), arrays_of(model))


def test_older_names_and_four_dimensional_matrices_are_understood():
    model = abstract_model("vmamba_t", width=8, depths=(1, 1, 1, 1), num_classes=3)
    official = weights_of(model)
    from_torch(model, official)
    expected = arrays_of(model)
    old = {}
    for name, array in official.items():
        name = name.replace(".blocks.0.norm.", ".blocks.0.ln_1.").replace(".op.", ".self_attention.")
        name = name.replace("classifier.", "").replace("patch_embed.0.", "patch_embed.proj.")
        is_layer = name.endswith(("in_proj.weight", "fc1.weight", "fc2.weight"))
        old[name] = array[:, :, None, None] if is_layer else array
    assert old.keys() != official.keys()
    from_torch(model, old)
    chex.assert_trees_all_equal(arrays_of(model), expected)


def test_the_deeper_third_stage_of_b_moves_its_downsampling():
    shapes = manifest(abstract("evmamba_b"))
    assert shapes["layers.2.11.reduction.weight"] == (768, 4 * 384)
    assert {name.split(".")[2] for name in shapes if name.startswith("layers.2.")} == set(map(str, [*range(1, 10), 11]))


def test_a_headless_model_has_no_head_in_its_table():
    assert not [name for name in manifest(small(num_classes=0)) if "classifier.head" in name]


def test_each_layout_element_by_element():
    model = small()
    official = weights_of(model)
    from_torch(model, official)
    ours = {path: np.asarray(array) for path, array in arrays_of(model).items()}
    k, inner, states, rank = 4, 32, 2, 1
    for index in np.ndindex(4, 4, 3, 16):
        assert (
            ours["patch_embed.proj.kernel"][index] == official["patch_embed.0.weight"][index[3], index[2], *index[:2]]
        )
    for name, size in (("dw.kernel", "0.weight"), ("pw.kernel", "3.weight")):
        kernel, weight = (
            ours[f"stages.0.blocks.0.conv_branch.{name}"],
            official[f"layers.0.blocks.0.conv_branch.{size}"],
        )
        for i, o in np.ndindex(3 if name == "dw.kernel" else 16, 16):
            if name == "dw.kernel":
                assert kernel[i, 1, 0, o] == weight[o, 0, i, 1]
            else:
                assert kernel[i, o] == weight[o, i, 0, 0]
    scan, reference = "stages.0.blocks.0.op.scan", "layers.0.blocks.0.op"
    for d, e in np.ndindex(k, inner):
        assert ours[f"{scan}.D"][d, e] == official[f"{reference}.Ds"][d * inner + e]
        assert ours[f"{scan}.dt_bias"][d, e] == official[f"{reference}.dt_projs_bias"][d, e]
        for n in range(states):
            assert ours[f"{scan}.A_log"][d, e, n] == official[f"{reference}.A_logs"][d * inner + e, n]
        for c in range(rank + 2 * states):
            assert ours[f"{scan}.x_proj"][d, e, c] == official[f"{reference}.x_proj_weight"][d, c, e]
        for r in range(rank):
            assert ours[f"{scan}.dt_proj"][d, r, e] == official[f"{reference}.dt_projs_weight"][d, e, r]
    chex.assert_trees_all_equal(
        [np.asarray(ours[f"stages.3.blocks.2.norm2.{name}"]) for name in ("scale", "bias", "mean", "var")],
        [official[f"layers.3.3.conv_dw.1.{name}"] for name in ("weight", "bias", "running_mean", "running_var")],
    )
    chex.assert_trees_all_equal(np.asarray(ours["head.kernel"]), official["classifier.head.weight"].T)


def test_types_of_the_arrays():
    model, wide = small(), small()
    official = weights_of(model)
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in official.items()}
    double = {name: array.astype(np.float64) for name, array in official.items()}
    from_torch(model, half)
    assert {str(a.dtype) for a in arrays_of(model).values()} == {"float32"}
    from_torch(model, double)  # 64 bits are off
    assert {str(a.dtype) for a in arrays_of(model).values()} == {"float32"}
    with jax.enable_x64(True):
        from_torch(wide, double)
        assert {str(a.dtype) for a in arrays_of(wide).values()} == {"float64"}


def test_the_model_keeps_its_own_memory():
    model = small()
    official = weights_of(model)
    from_torch(model, official)
    before = {path: np.array(array) for path, array in arrays_of(model).items()}
    for array in official.values():
        array[...] = np.nan
    chex.assert_trees_all_equal({path: np.asarray(array) for path, array in arrays_of(model).items()}, before)


def without(official, name):
    return {k: v for k, v in official.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "patch_embed.2.bias"), "(1 missing: 'patch_embed.2.bias')"),
        (lambda s: s | {"outnorm0.weight": s["patch_embed.2.bias"]}, "(1 unexpected: 'outnorm0.weight')"),
        (
            lambda s: s | {"classifier.head.weight": np.zeros((1000, 128))},
            "(1 of another shape: 'classifier.head.weight' is (1000, 128) instead of (5, 128))",
        ),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "unexpected: 'module.patch_embed.0.weight', "),
        (lambda s: {}, "missing: 'patch_embed.0.weight', 'patch_embed.0.bias', 'patch_embed.2.weight' and "),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(change, message):
    model = small()
    official = weights_of(model)
    from_torch(model, official)
    before = arrays_of(model)
    with pytest.raises(UserError) as error:
        from_torch(model, change(official))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    chex.assert_trees_all_equal(arrays_of(model), before)


@pytest.mark.parametrize(("option", "value"), [("squeeze_excite", 2), ("local", "separable")])
def test_options_without_official_weights_are_named(option, value):
    model = abstract_model("vim_t", width=8, depth=1, **{option: value})
    official = weights_of(abstract_model("vim_t", width=8, depth=1))
    for convert in (lambda: from_torch(model, official), lambda: to_torch(model)):
        with pytest.raises(
            UserError, match=f"^Vim with {option}={value!r} has no official names: only {option}=.* has"
        ):
            convert()


def test_counters_are_ignored():
    model = small()
    from_torch(model, weights_of(model) | {"layers.2.1.conv_pw.1.num_batches_tracked": np.asarray(3)})


def test_a_foreign_module_is_refused():
    with pytest.raises(UserError, match="no table of official names for Linear; there is one for EfficientVMamba"):
        from_torch(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {})


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """Return a file with the weights of EfficientVMamba-T under names as an averaged parallel model saves them."""
    path = tmp_path_factory.mktemp("official") / "tiny.safetensors"
    official = weights(facts(MODELS["evmamba_t"])["state_dict"])
    save_file({f"module.module.{name}": array for name, array in official.items()}, path)
    return path


def test_the_command_makes_a_checkpoint_that_create_model_reads(tiny_file, tmp_path, capsys):
    out = tmp_path / "converted"
    assert main(["convert", "--model", "evmamba_t", "--torch", str(tiny_file), "--out", str(out)]) == 0
    assert "evmamba_t" in capsys.readouterr().out
    direct = abstract("evmamba_t")
    from_torch(direct, weights(facts(MODELS["evmamba_t"])["state_dict"]))
    restored = create_model("evmamba_t", pretrained=out)
    chex.assert_trees_all_equal(arrays_of(restored), arrays_of(direct))
    assert load_model(out)[2] == {
        "model": "evmamba_t",
        "options": {},
        "converted_from": tiny_file.name,
        "key": None,
    }


def test_a_fine_tuned_file_goes_to_a_checkpoint_and_back_to_a_file(tmp_path, capsys):
    options = ["--option", "width=16", "--option", "depths=(1, 2, 1, 3)", "--option", "num_classes=5"]
    options += ["--option", "d_state=2"]
    official = weights_of(small())
    given, folder, out = tmp_path / "given.safetensors", tmp_path / "converted", tmp_path / "new" / "out.safetensors"
    save_file(official, given)
    convert = ["convert", "--model", "evmamba_t", "--torch", str(given), "--out", str(folder), *options]
    assert main(convert) == 0
    export = ["export", "--model", "evmamba_t", "--checkpoint", str(folder), "--out", str(out), *options]
    assert main(export) == 0
    written = load_file(out)
    chex.assert_trees_all_equal({k: written[k] for k in official}, official)
    assert {name.rsplit(".", 1)[-1] for name in written.keys() - official.keys()} == {"num_batches_tracked"}

    capsys.readouterr()
    assert main(export) == 2
    assert "out.safetensors' exists; name a new file" in capsys.readouterr().err
    assert main([*export[:6], str(tmp_path / "out.pth"), *options]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert main([*export, "--option", "width"]) == 2
    assert "--option 'width' must be NAME=VALUE" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run that found its moving average better, and the official weights of both."""
    folder, (model, average) = tmp_path_factory.mktemp("run"), (small(), small())
    official = weights_of(model)
    half = {name: array / 2 for name, array in official.items()}
    from_torch(model, official)
    from_torch(average, half)
    items = {
        name: dict(zip(("params", "batch_stats"), split(part)[1:], strict=True))
        for name, part in (("model", model), ("ema", average))
    }
    options = {name: value for name, value in SMALL.items() if name != "num_classes"}
    meta = {
        **{"model": "evmamba_t", "num_classes": 5, "class_names": list("abcde"), "ema": True},
        **{"step": 9, "evaluated": 9, "figures": {"top1": 50.0, "ema_top1": 51.0}},
        "config": {"data": {"in_channels": 3}, "model": {"options": options}},
    }
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(9, items, meta=meta)
    return folder, official, half


@pytest.mark.parametrize(
    ("flags", "part", "words"),
    [
        ([], "average", "moving average (top-1 51 against 50)"),
        (["--ema", "yes"], "average", "moving average"),
        (["--ema", "no"], "parameters", "parameters"),
    ],
)
def test_a_run_is_exported_and_converted_as_what_its_evaluation_found_better(run, tmp_path, capsys, flags, part, words):
    """Neither needs a name or options, which the run has; what was taken is told."""
    folder, official, half = run
    expected = half if part == "average" else official
    file, converted = tmp_path / "out.safetensors", tmp_path / "converted"
    assert main(["export", "--checkpoint", str(folder), "--out", str(file), *flags]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [f"weights: {folder}/checkpoints/9, {words}", f"{file}: these weights under the official names"]
    written = load_file(file)
    chex.assert_trees_all_equal({name: written[name] for name in expected}, expected)

    assert main(["convert", "--torch", f"{folder}/checkpoints/9", "--out", str(converted), *flags]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == [f"weights: {folder}/checkpoints/9, {words}", f"{converted}: evmamba_t with these weights"]
    model, name, meta = open_model(converted)
    back = to_torch(model)
    chex.assert_trees_all_equal({name: back[name] for name in expected}, expected)
    assert (name, meta["class_names"], meta["converted_from"]) == ("evmamba_t", list("abcde"), "9")
    assert not (converted / "0" / "ema").exists()


def test_a_file_is_exported_and_a_converted_model_converted_again(tiny_file, tmp_path):
    """Any place will do for either command."""
    assert main(["convert", "--model", "evmamba_t", "--torch", str(tiny_file), "--out", str(tmp_path / "one")]) == 0
    assert main(["convert", "--torch", str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 0
    for place, model in ((tiny_file, ["--model", "evmamba_t"]), (tmp_path / "two", [])):
        out = tmp_path / f"{place.stem}.safetensors"
        assert main(["export", *model, "--checkpoint", str(place), "--out", str(out)]) == 0
        written, official = load_file(out), weights(facts(MODELS["evmamba_t"])["state_dict"])
        chex.assert_trees_all_equal(
            {name: written[name] for name in official if "num_batches" not in name},
            {name: array for name, array in official.items() if "num_batches" not in name},
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "evmamba_x"}, "unknown model 'evmamba_x'"),
        (
            {"--model": "evmamba_s"},
            "of another shape: 'patch_embed.0.weight' is (48, 3, 4, 4) instead of (64, 3, 4, 4)",
        ),
        ({"--torch": "absent.pth"}, "'absent.pth' does not exist; give a file of official weights"),
        ({"--out": "{full}"}, "is not an empty folder"),
        ({"--key": "model"}, "safetensors file, which has no entries"),
    ],
)
def test_mistakes_at_the_command_line(tiny_file, tmp_path, capsys, changed, message):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").touch()
    out = tmp_path / "out"
    options = {"--model": "evmamba_t", "--torch": str(tiny_file), "--out": str(out)}
    options |= {name: value.format(full=full) for name, value in changed.items()}
    assert main(["convert", *(text for option in options.items() for text in option)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
    assert [path.name for path in full.iterdir()] == ["precious"]
