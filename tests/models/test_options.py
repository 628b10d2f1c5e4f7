"""What create_model is given: every option that cannot be is refused by name, whatever the family."""

import jax.numpy as jnp
import numpy as np
import pytest

from evmamba_jax import create_model
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model, configuration

NAN, INF = float("nan"), float("inf")
OF_ALL = {
    "num_classes": (-3, 1.5, "10", NAN, None, True),
    "in_channels": (0, -1, 3.0, "3"),
    "drop_path_rate": (-0.1, 1, 1.0, 2.0, NAN, "0.1", (0.1, 0.2), True),
    "dtype": ("float8", "int32", int, "bf17", 3, np.complex64, bool),
    "remat": ("blocks", None, 1, ["block"]),
    "implementation": ("cuda", 1, ""),
    "width": (0, -8, 8.0, "8", NAN, None, True),
    "d_state": (0, -1, 2.5, "16"),
}
OF_STAGES = {
    "depths": ((1, 1), (1, 1, 1, 1, 1), (1, 1, -1, 1), (1, 1, 1.5, 1), 4, "2242", (True,) * 4, None),
    "out_norms": (1, "yes", None),
}
CASES = {
    "evmamba_t": OF_ALL | OF_STAGES | {"patch_size": (0, -4, 4.0, (4, 4)), "ssm_ratio": (0, -1, NAN, INF, "2", 0.001)},
    "vmamba_t": OF_ALL
    | OF_STAGES
    | {
        "width": (0, 1),
        "ssm_ratio": (0, -1, 0.001),
        "mlp_ratio": (-1, NAN, 0.001),
        "gate": (1, None),
        "act": ("swish", None, 3),
        "init": ("zeros", ["zero"]),
        "scan": ("cros", (), 3, None, ("cross",)),
    },
    "msvmamba_t": OF_ALL | OF_STAGES | {"version": (3, "v2", True, 1.0), "ffn_ratio": (0, -1), "leak_state": ("no",)},
    "mambavision_t": OF_ALL
    | OF_STAGES
    | {
        "stem_width": (0, 1.5),
        "num_heads": ((2, 4), (2, 4, 0, 8), 4, (2, 4, 7, 16)),
        "window_size": ((8, 8, 0, 7), (8, 8), 7, (8, 8, 14.0, 7)),
        "mlp_ratio": (0, -1, 0.001),
        "layer_scale": (0, -1, NAN, "1e-5"),
        "d_conv": (0, -3),
        "attention_radius": (-1, 1.5, "3", True, (1, 2)),
        "attention_edges": ("crop", None, True),
        "ssm": ("s4", None, 5),
        "ssm_bidirectional": (1, None, "yes"),
        "downsample": ("pool", None),
        "pool": ("max", None),
        "conv_block": ("mobilenet", None),
        "stem": ("patch", None),
        "stem_norm": ("group", None),
    },
    "vim_t": OF_ALL
    | {
        "depth": (0, -1, 1.5),
        "image_size": (0, 15, (224,), (224, 224, 3), "224", 224.0, (224, 0)),
        "patch_size": (0, -16),
        "stride": (0, -1, 1.5),
        "expand": (0, 1.5),
        "pos_embed_class_token": ("centre", None),
        "squeeze_excite": (0, 193, 4.0, True),
        "local": ("conv", None, "pointwise"),
        "local_ratio": (0, 1.5),
    },
    "course_vim": OF_ALL
    | {
        "dt_rank": (0, 1.5),
        "dropout": (-0.1, 1.0, NAN, None),
        "image_size": (3, (32,), 32.0),
        "squeeze_excite": (0, 97),
        "local": ("causal", None),
    },
}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [(name, option, value) for name, cases in CASES.items() for option, values in cases.items() for value in values],
)
def test_what_cannot_be_is_refused_by_name(name, option, value):
    with pytest.raises(UserError) as caught:
        abstract_model(name, **{option: value})
    assert option in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ssm", ["s4d", "s5"])
def test_states_in_pairs_are_even(ssm):
    with pytest.raises(UserError, match="d_state=5 is not allowed with S"):
        abstract_model("mambavision_t", ssm=ssm, d_state=5)


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float32", jnp.bfloat16, jnp.float16, np.float32, np.dtype("float64"), jnp.dtype("bfloat16"), None],
)
def test_types_are_taken_by_any_of_their_names(dtype):
    assert configuration("evmamba_t", dtype=dtype).dtype is dtype


def test_numbers_of_numpy_are_taken_and_can_be_hashed():
    config = configuration("evmamba_t", width=np.int64(16), depths=[np.int32(1), 0, 1, 0], drop_path_rate=np.float32(0))
    assert config == configuration("evmamba_t", width=16, depths=(1, 0, 1, 0), drop_path_rate=0.0)
    assert isinstance(hash(config), int)


@pytest.mark.parametrize("name", [3, None, ["evmamba_t"]])
def test_names_that_are_no_text_are_unknown(name):
    with pytest.raises(UserError, match="unknown model"):
        create_model(name)


def test_a_seed_is_no_source_of_random_numbers():
    with pytest.raises(UserError, match=r"rngs=0 is not allowed: it must be an nnx\.Rngs"):
        create_model("evmamba_t", rngs=0)
