"""Counters against formulas written out by hand, and against the official counters."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from evmamba_jax import create_model
from evmamba_jax.analysis.flops import main
from evmamba_jax.counting import count_flops, count_parameters, flops_by_operation, xla_flops
from evmamba_jax.detection import create_detector
from evmamba_jax.errors import UserError
from evmamba_jax.layers.norm import BatchNorm
from evmamba_jax.layers.s6 import S6
from evmamba_jax.models import abstract_model
from pallas_kernels import CROSS


def abstract(name, **options):
    return abstract_model(name, **options)


class Program(nnx.Module):
    """A module around a function of one weight (3, 5) and the image (1, H, W, 3)."""

    def __init__(self, function):
        self.weight = nnx.Param(jnp.ones((3, 5)))
        self.function = function
        self.in_channels = 3

    def __call__(self, x):
        return self.function(x, self.weight[...])


def scan2d_cost(length, orders, channels, rank, states):
    """Projections to R + 2N numbers and from R to E, the recurrence, and the skip, for every token of every order."""
    tokens = orders * length
    products = tokens * channels * (rank + 2 * states) + tokens * rank * channels
    return products, tokens * channels * (9 * states + 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 21)])
def test_vmamba_by_hand(height, width):
    c, classes, n = 16, 10, 3
    model = abstract("vmamba_t", width=c, depths=(1, 0, 0, 1), num_classes=classes, d_state=n, ssm_ratio=2.0)
    sides = [(height, width)]
    for _ in range(5):
        sides.append(tuple(-(-side // 2) for side in sides[-1]))
    pixels = [h * w for h, w in sides]
    convolutions = 9 * (pixels[1] * 3 * c // 2 + pixels[2] * c // 2 * c)
    convolutions += 9 * sum(pixels[3 + i] * (c * 2**i) * (c * 2 ** (i + 1)) for i in range(3))
    products, scans = 8 * c * classes, 0
    for length, channels in ((pixels[2], c), (pixels[5], 8 * c)):
        inner = 2 * channels
        projections, recurrence = scan2d_cost(length, 4, inner, -(-channels // 16), n)
        convolutions += 9 * length * inner
        products += length * channels * (inner + inner + 4 * channels + 4 * channels) + projections
        scans += recurrence
    wanted = {"convolutions": convolutions, "products": products, "scans": scans}
    assert flops_by_operation(model, (height, width)) == wanted
    assert count_flops(model, (height, width)) == sum(wanted.values())


@pytest.mark.parametrize("local", ["causal", "separable", "inverted_residual"])
def test_variations_of_vim_by_hand(local):
    c, e, n, ratio, depth = 16, 32, 3, 5, 2
    options = {"local": local, "local_ratio": ratio, "squeeze_excite": 4}
    model = abstract("vim_t", width=c, depth=depth, d_state=n, num_classes=10, **options)
    patches, tokens = 2 * 3, 2 * 3 + 1
    projections, recurrence = scan2d_cost(tokens, 1, e, 1, n)
    # Of a direction: the products and the convolutions.
    mixed, convolved = {
        "causal": (0, 4 * e * tokens),
        "separable": (0, 9 * e * patches),
        "inverted_residual": (2 * e * ratio * e * patches, 9 * ratio * e * patches),
    }[local]
    gate = 2 * c * c // 4
    block = tokens * (c * 2 * e + e * c) + 2 * (projections + mixed) + gate
    assert flops_by_operation(model, (32, 48)) == {
        "products": depth * block + c * 10,
        "convolutions": 16**2 * 3 * c * patches + depth * 2 * convolved,
        "scans": depth * 2 * recurrence,
    }


@pytest.mark.parametrize("local", ["pointwise", "inverted_residual"])
def test_the_courses_model_by_hand(local):
    c, rank, n, tokens = 16, 3, 5, 2 * 4
    options = {"width": c, "depth": 1, "dt_rank": rank, "d_state": n, "local": local, "squeeze_excite": 2}
    counted = flops_by_operation(abstract("course_vim", **options), (8, 16))
    projections, recurrence = scan2d_cost(tokens, 1, c, rank, n)
    mixed, convolved = (c * c, 0) if local == "pointwise" else (2 * 4 * c * c, 3 * 4 * c)
    products = tokens * (48 * c + c * c + 2 * mixed) + 2 * projections + 2 * c * c // 2 + c * 10
    assert counted == {"products": products, "scans": 2 * recurrence} | (
        {"convolutions": 2 * tokens * convolved} if convolved else {}
    )


def test_tokens_of_the_padding_count():
    model = abstract("evmamba_t", width=16, depths=(1, 0, 0, 0), d_state=4)
    # A map of 5x7 is padded to 6x8, of which every order walks 3x4.
    assert flops_by_operation(model, (20, 28))["scans"] == scan2d_cost(12, 4, 32, 1, 4)[1]


def test_attention_is_apart():
    model = abstract("mambavision_t")
    counted = flops_by_operation(model)
    # Of 8 and 4 blocks the second halves: 196 and 49 tokens of 320 and 640 channels, queries by keys and by values.
    attention = 2 * (4 * 196**2 * 320 + 2 * 49**2 * 640)
    assert counted["attention"] == attention
    assert count_flops(model) == counted["products"] + counted["convolutions"] + counted["scans"]


def test_variations_of_mambavision_by_hand():
    """An image of 64x320: maps of 16x80, 8x40, 4x20 and 2x10; 4x20 is five windows."""
    c, n, small = 64, 6, {"width": 16, "stem_width": 8, "depths": (1, 0, 2, 0), "num_heads": (1, 1, 2, 4)}
    small |= {"window_size": (8, 8, 4, 4), "d_state": n}

    @functools.cache
    def counted(**options):
        return Counter(flops_by_operation(abstract("mambavision_t", **{**small, **options}), (64, 320)))

    published = counted()

    def more(**options):
        ours = counted(**options)
        differences = {kind: ours[kind] - published[kind] for kind in (*published, *ours)}
        return {kind: number for kind, number in differences.items() if number}

    tokens, e = 80, c // 2
    # Three tiles of 4x7 pixels, of which the last reaches over the map, each with a halo of 4x9.
    assert more(attention_radius=1) == {"attention": 2 * c * (3 * 4 * 7 * 4 * 9 - 5 * 16 * 16)}
    assert more(attention_radius=1, attention_edges="shift") == more(attention_radius=1)
    assert more(attention_radius=20) == {"attention": 2 * c * (3 * 4 * 7 * 80 - 5 * 16 * 16)}

    projections, recurrence = scan2d_cost(tokens, 1, e, c // 16, n)
    assert more(ssm_bidirectional=True) == {"products": projections, "scans": recurrence}
    # A transform there and one back, of twice as many numbers, for every window and channel; two windows of 17x17.
    system = {"products": -projections, "scans": -recurrence, "transforms": 5 * 2 * e * 5 * 32 * 5}
    assert more(ssm="s4d") == more(ssm="s4d", ssm_bidirectional=True) == system
    transforms = counted(ssm="s4d", window_size=(8, 8, 17, 4))["transforms"]
    assert transforms == pytest.approx(2 * 2 * e * 5 * 578 * math.log2(578), rel=1e-4)
    for directions in (1, 2):
        system = {"products": tokens * e * (n + directions * n) - projections}
        system["scans"] = directions * 4 * tokens * n // 2 - recurrence
        assert more(ssm="s5", ssm_bidirectional=directions == 2) == system

    pixels = {16: 16 * 80, 32: 8 * 40, 64: 4 * 20, 128: 2 * 10}
    halved = [(width, pixels[width], pixels[2 * width]) for width in (16, 32, 64)]
    assert more(downsample="attention") == {
        "convolutions": -sum(18 * width**2 * after for width, _, after in halved),
        "products": sum(width * before + 2 * width**2 * after for width, before, after in halved),
        "attention": sum(4 * width * after for width, _, after in halved),
    }
    assert more(downsample="convnext") == {"convolutions": -sum(10 * width**2 * after for width, _, after in halved)}
    assert more(pool="attention") == {"products": (2 * 20 + 1) * 128**2 + 20 * 128, "attention": 20 * 128}
    wide = {"convolutions": pixels[16] * (49 * 16 - 18 * 16**2), "products": 8 * 16**2 * pixels[16]}
    assert more(conv_block="convnext") == wide
    assert more(stem="patchify") == {"convolutions": pixels[16] * (48 * 16 - 9 * (4 * 3 * 8 + 8 * 16))}
    assert more(stem_norm="layer") == {}


def test_loops_count_as_often_as_they_turn():
    def function(x, weight):
        return jax.lax.scan(lambda carry, _: (carry + x @ weight, None), jnp.zeros((*x.shape[:-1], 5)), length=7)[0]

    assert count_flops(Program(function), (2, 4)) == 7 * 2 * 4 * 3 * 5


def test_only_products_with_the_image_count():
    def function(x, weight):
        made_once = weight @ jnp.ones((5, 5))
        moved = jnp.einsum("bhwc,Hh->bHwc", x, jnp.ones((6, x.shape[1])))
        return moved @ jax.jit(lambda w: w + 1)(made_once)

    assert flops_by_operation(Program(function), (2, 4)) == {"products": 6 * 4 * 3 * 5}


def test_a_loop_without_a_number_of_turns_is_refused():
    def function(x, weight):
        return jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ weight @ weight.T, x)

    with pytest.raises(NotImplementedError, match="cannot count inside while"):
        count_flops(Program(function), 2)


def test_the_callers_model_stays_as_it_is():
    model = create_model("evmamba_t", width=16, depths=(1, 0, 0, 0), drop_path_rate=0.5, rngs=nnx.Rngs(0))
    model.train()
    before = count_flops(model, 16)
    scans = [part for _, part in nnx.iter_modules(model) if isinstance(part, S6)]
    assert [part.implementation for part in scans] == [None]
    assert not model.stages[0].blocks[0].drop_path.deterministic
    model.eval()
    assert count_flops(model, 16) == before


def test_names_take_the_size_of_their_card():
    assert count_flops("evmamba_t") == count_flops("evmamba_t", (224, 224)) == count_flops(abstract("evmamba_t"))
    with pytest.raises(UserError, match="unknown model 'evmamba_x'"):
        count_flops("evmamba_x")
    with pytest.raises(UserError, match="image size 2x2 is too small"):
        count_flops("evmamba_t", 2)


def test_parameters_of_a_small_model():
    c, n, e = 16, 4, 32
    model = abstract("evmamba_t", width=c, depths=(1, 0, 0, 0), d_state=n, num_classes=0)
    scan = 4 * (e * (1 + 2 * n) + e + e + e * n + e)
    mixer = c * 2 * e + (9 * e + e) + scan + 2 * e + e * c
    branch = (9 * c + c) + 2 * c + (c * c + c)
    gate = 2 * c + (c * c // 8 + c // 8) + (c // 8 * c + c)
    block = 2 * c + mixer + branch + gate
    merging = sum(2 * (4 * c * 2**i) + (4 * c * 2**i) * (2 * c * 2**i) for i in range(3))
    assert count_parameters(model) == (48 * c + c + 2 * c) + block + merging + 2 * 8 * c


def maps(*stages):
    """Return the elements of (blocks, side, channels) maps."""
    return sum(blocks * side**2 * channels for blocks, side, channels in stages)


# What fvcore counts beside norms: pooled elements (of squeeze-and-excitation and of the last map) and resized ones.
EVMAMBA_T = maps((4, 14, 768), (2, 7, 1536), (1, 7, 384))
MSVMAMBA_N = 5 * maps((1, 56, 96), (2, 28, 192), (5, 14, 384), (2, 7, 768)) + maps((1, 7, 384))
MSVMAMBA_T_V2 = 2 * maps((2, 56, 96), (2, 28, 192), (9, 14, 384), (2, 7, 768)) + maps((1, 7, 768))


# fvcore reads the cost of an einsum from a text of four digits: the older models, written with einsum, agree to 1e-5.
@pytest.mark.parametrize(
    ("name", "official", "others", "tolerance"),
    [
        ("vmamba_t", 4_905_609_984, maps((1, 7, 768)), 0),
        ("msvmamba_t_v2", 5_133_861_504, MSVMAMBA_T_V2, 0),
        ("vmamba_t_v0", 5_626_895_040, maps((1, 7, 768)), 1e-5),
        ("msvmamba_n", 882_952_156, MSVMAMBA_N, 1e-5),
        ("evmamba_t", 806_431_376, EVMAMBA_T, 1e-5),
    ],
)
def test_the_official_counter_agrees_to_the_unit(name, official, others, tolerance, monkeypatch):
    elements = Counter()
    for kind in (nnx.LayerNorm, BatchNorm):

        def call(self, x, kind=kind, own=kind.__call__):
            elements[kind] += x.size
            return own(self, x)

        monkeypatch.setattr(kind, "__call__", call)
    flops = count_flops(name)
    norms = 5 * elements[nnx.LayerNorm] + 2 * elements[BatchNorm]
    assert flops + norms + others == pytest.approx(official, rel=tolerance, abs=0)


def test_xla_counts_multiplications_and_additions():
    assert xla_flops(Program(lambda x, weight: x @ weight), (4, 8)) == 2 * 4 * 8 * 3 * 5


def test_xla_counts_every_block():
    one, two, four = (xla_flops(abstract("vim_t", width=16, depth=n, image_size=32), 32) for n in (1, 2, 4))
    assert four - one == 3 * (two - one) > 0


def test_xla_counts_every_token_of_a_scan():
    class Scan(nnx.Module):
        def __init__(self):
            self.scan = S6(3, 4, d_state=2, dt_rank=1, rngs=nnx.Rngs(0))
            self.in_channels = 3

        def __call__(self, x):
            return self.scan(x, CROSS)

    small, large = (xla_flops(Scan(), side) for side in (8, 16))
    products, _ = scan2d_cost(64, 4, 3, 1, 2)
    assert small > 2 * products + 64 * 4 * 3 * 2 * 5
    assert large / small == pytest.approx(4, rel=0.05)


def test_the_command_prints_both_counts(capsys):
    assert main(["evmamba_t", "--image-size", "32", "64"]) == 0
    titles, row = capsys.readouterr().out.splitlines()
    assert titles.split()[:3] == ["model", "parameters", "FLOPs"]
    assert row.split()[:3] == ["evmamba_t", "6.5", f"{count_flops('evmamba_t', (32, 64)) / 1e6:,.1f}"]
    assert row.split()[-1] == f"{xla_flops('evmamba_t', (32, 64)) / 1e6:,.1f}"
    assert main(["evmamba_x"]) == 2
    assert "unknown model 'evmamba_x'" in capsys.readouterr().err


def test_a_detector_costs_its_backbone_and_the_convolutions_behind_it():
    """RetinaNet's written out: laterals, outputs, two further levels, and for each level two towers and two answers."""
    width, classes, channels = 8, 3, (16, 32, 64)  # of the maps at 8, 16 and 32 pixels
    options = {"width": 8, "depths": (1, 1, 1, 1)}
    model = nnx.eval_shape(
        lambda: create_detector(
            "retinanet", backbone="evmamba_t", num_classes=classes, width=width, backbone_options=options
        )
    )

    class Features(nnx.Module):
        def __init__(self, backbone):
            self.backbone = backbone

        def __call__(self, images):
            return self.backbone.features(images)

    cells = [12 * 16, 6 * 8, 3 * 4, 2 * 2, 1]  # of five levels, of an image of 96x128 pixels
    heads = sum(n * c * width + n * 9 * width**2 for n, c in zip(cells, channels, strict=False))
    heads += cells[3] * 9 * channels[-1] * width + cells[4] * 9 * width**2
    heads += sum(cells) * (8 * 9 * width**2 + 9 * width * 9 * (classes + 4))
    assert count_flops(model, (96, 128)) == count_flops(Features(model.backbone), (96, 128)) + heads
