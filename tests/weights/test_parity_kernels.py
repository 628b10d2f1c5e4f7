"""Recorded outputs of the official code (tests/golden), every scan done by the TPU kernels in Pallas's interpreter.

What is compared, and how closely, is that of the other ``test_parity_*.py``. Float64 has no kernels: whole models are
run in float32, and compared with their float64 recordings as widely as float32 allows.
"""

import jax
import numpy as np
import pytest
import test_parity_efficientvmamba as efficientvmamba
import test_parity_mambavision as mambavision
import test_parity_msvmamba as msvmamba
import test_parity_vim as vim
import test_parity_vmamba as vmamba
from flax import nnx
from interpreted import one_token_a_turn
from official_outputs import arrays, assert_near, assert_part, official

from evmamba_jax.layers.s6 import S6


@pytest.fixture(autouse=True)
def fast_to_compile(monkeypatch):
    one_token_a_turn(monkeypatch)


def with_kernels(module):
    """Have every scan of a module done by the kernels, and return it."""
    scans = [part for _, part in nnx.iter_modules(module) if isinstance(part, S6)]
    assert scans
    for scan in scans:
        scan.implementation = "pallas_interpret"
    return module


# Of the cases with scans those that the interpreter compiles in seconds, which takes long for four walks of 16 states;
# where some differ in size alone, one whose grid needs padding.
PARTS = {
    "op_efficientvmamba": (efficientvmamba.PARTS, ["ss2d_7x5"]),
    "op_vmamba": (vmamba.PARTS, ["ss2d_v05_noz_ratio2_nhwc_5x7"]),
    "op_msvmamba": (msvmamba.PARTS, ["ss2d_5x6"]),
    "op_mambavision": (mambavision.PARTS, ["mixer_49", "level_7x10_layer_scale"]),
}


@pytest.mark.parametrize(("doc", "case"), [(doc, case) for doc, (_, cases) in PARTS.items() for case in cases])
def test_parts_and_all_their_gradients(doc, case):
    build, rows, *rest = PARTS[doc][0][case]
    to_ours = rest[0] if rest else np.asarray
    assert_part(doc, case, lambda rngs: with_kernels(build(rngs)), rows, to_ours=to_ours)


def test_vim_mixer_and_all_its_gradients():
    assert_part("op_vim", "mixer_11", lambda rngs: with_kernels(vim.VimMixer(16, rngs=rngs)), vim.tables.MIXER)


SCANS = {
    *("full_g1_n1", "full_g4_n1", "full_g2_n8", "full_g4_n16", "no_bias_g4_n1", "bare_g1_n1"),
    *("one_step_g4_n16", "long_g4_n1", "big_delta_g2_n4"),
}


@pytest.mark.parametrize("case", sorted(SCANS))
def test_selective_scan_and_all_its_gradients(case):
    efficientvmamba.test_selective_scan_and_all_its_gradients(case, "pallas_interpret")


FOUR = {"depths": (1, 1, 1, 1), "num_classes": 10}
MODELS = {
    "efficientvmamba_odd": ("evmamba_t", {"width": 8, **FOUR}),
    "vmamba_cascade": ("vmamba_t", {"width": 8, **FOUR, "depths": (1, 0, 1, 0), "scan": "cascade"}),
    "vmamba_v0": ("vmamba_t_v0", {"width": 8, **FOUR}),
    "msvmamba_v2": ("msvmamba_t_v2", {"width": 16, **FOUR, "depths": (1, 0, 1, 0)}),
    "msvmamba_v2_gated": ("msvmamba_b_v2", {"width": 16, **FOUR, "depths": (0, 1, 0, 1)}),
    "vim_rectangle": ("vim_t", {"width": 16, "depth": 4, "image_size": (75, 50), "num_classes": 10}),
    "mambavision_scale": (
        "mambavision_b",
        {"width": 16, "stem_width": 8, **FOUR, "depths": (1, 1, 2, 2), "num_heads": (2, 4, 8, 16)},
    ),
}


@pytest.mark.parametrize("golden", MODELS)
def test_whole_models(golden):
    name, options = MODELS[golden]
    model, images = official(name, golden=golden, **options)
    run = jax.jit(lambda model, images: (model(images), model.features(images)))
    logits, maps = run(with_kernels(model), images)
    expected = arrays(golden)
    assert_near(logits, expected["logits_f64"], 2e-5, what="logits")
    assert len(maps) == sum(key.startswith("feat_f64/") for key in expected)
    for i, ours in enumerate(maps, 1):
        assert_near(ours[:1], expected[f"feat_f64/stage{i}"], 2e-5, what=f"stage {i}")
