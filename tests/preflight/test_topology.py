"""Names of TPU systems, and what Google publishes about them."""

import math

import pytest

from evmamba_jax.preflight import aot


@pytest.mark.parametrize(
    ("name", "generation", "shape", "chips", "hosts"),
    [
        # Google's tables of accelerator types: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x.
        ("v5e-1", "v5e", (1, 1), 1, 1),
        ("v5e-8", "v5e", (2, 4), 8, 1),
        ("v5e-16", "v5e", (4, 4), 16, 4),
        ("v5e-256", "v5e", (16, 16), 256, 64),
        ("v5litepod-256", "v5e", (16, 16), 256, 64),
        ("2xv5e-256", "v5e", (16, 16), 512, 128),
        ("v6e-8", "v6e", (2, 4), 8, 1),
        ("v6e-64", "v6e", (8, 8), 64, 16),
        ("v4-8", "v4", (2, 2, 1), 4, 1),
        ("v4-32", "v4", (2, 2, 4), 16, 4),
        ("v4-512", "v4", (4, 8, 8), 256, 64),
        ("v5p-8", "v5p", (2, 2, 1), 4, 1),
        ("v5p-128", "v5p", (4, 4, 4), 64, 16),
        ("v5p-1280", "v5p", (4, 8, 20), 640, 160),
        ("v5p-7168", "v5p", (8, 16, 28), 3584, 896),
        ("v5p-12288", "v5p", (16, 16, 24), 6144, 1536),
        ("tpu7x-8", "tpu7x", (2, 2, 1), 4, 1),
        ("tpu7x-128", "tpu7x", (4, 4, 4), 64, 16),
        ("3xtpu7x-128", "tpu7x", (4, 4, 4), 192, 48),
        ("v6e", "v6e", (1, 1), 1, 1),
    ],
)
def test_names(name, generation, shape, chips, hosts):
    topology = aot.topology(name)
    assert (topology.generation.name, topology.shape) == (generation, shape)
    assert (topology.chips, topology.hosts) == (chips, hosts)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("v9-8", "unknown topology 'v9-8'; there are v4-N"),
        ("v5e_8", "unknown topology"),
        ("", "unknown topology ''"),
        ("v5e-7", "there is no topology 'v5e-7': v5e-N counts chips, and N is 1, 4, 8, 16, 32, 64, 128, 256"),
        ("v5e-512", "there is no topology 'v5e-512'"),
        ("v4-33", "v4-N counts TensorCores, two a chip, and N is 2, 8, 16, 32, 64, and multiples of 128 up to 8192"),
        ("0xv5e-8", "there is no topology '0xv5e-8'"),
    ],
)
def test_names_that_do_not_exist(name, complaint):
    with pytest.raises(ValueError, match="topology") as caught:
        aot.topology(name)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_published_figures_fit_together():
    clocks = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}  # GHz
    for name, generation in aot.GENERATIONS.items():
        assert math.isclose(generation.clock / 1e9, clocks[name], rel_tol=0.01)
        # The compiler keeps little of a device's memory for itself; Google rounds v5p's down.
        assert 0.95 < generation.available * generation.devices_per_chip / generation.hbm_bytes < 1.01
