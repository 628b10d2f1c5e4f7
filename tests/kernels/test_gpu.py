"""The GPU kernels: interpreted, against loops in float64; and lowered for GPUs that are not there."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scan_oracle
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec, use_abstract_mesh

import pallas_kernels
from pallas_kernels import ATROUS, CROSS, Chain, Order, gpu
from pallas_kernels.gpu import images, walks

ARGUMENTS = ("x", "x_weight", "dt_weight", "dt_bias", "A", "D")
MIXED = (Order(origin=(1, 2), step=(2, 3), column_major=True, reverse=True), Order(), Order())
# Walks of one scan that share pixels and pass through padding; and an order beside it.
CHAINED = (
    Chain((Order(step=(2, 2), reverse=True), Order(column_major=True), Order(origin=(1, 0), step=(2, 3)))),
    Order(origin=(0, 1), step=(2, 2)),
)
BOTH = (Order(), Order(reverse=True))
# An interpreted kernel is a large program of small steps that runs once.
jit = functools.partial(jax.jit, compiler_options={"xla_llvm_disable_expensive_passes": True})


def close(actual, wanted, tolerance):
    scale = jax.tree.map(lambda w: np.abs(w).max() + 1e-30, wanted)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a, s: np.asarray(a, np.float64) / s, actual, scale),
        jax.tree.map(lambda w, s: w / s, wanted, scale),
        atol=tolerance,
        rtol=0,
    )


def scan2d(orders, axes=()):
    """Return the kernels as a function from the arguments of ``scan2d`` and dy to y and the gradients."""

    def program(problem, dy):
        arrays = [problem[name] for name in ARGUMENTS]
        forward, backward = gpu.SCAN2D.passes(orders=orders, axes=axes, interpret=True)
        (y,) = forward(*arrays)
        gradients = backward(arrays, (dy,))
        return y, dict(zip(ARGUMENTS, gradients, strict=True))

    return program


def problem2d(orders, grid, *, state, rank, channels=5, dtype=np.float32):
    problem = scan_oracle.make_scan2d(
        1, height=grid[0], width=grid[1], orders=len(orders), state=state, rank=rank, channels=channels
    )
    problem = {name: jnp.asarray(a, dtype if name == "x" else np.float32) for name, a in problem.items()}
    dy = jnp.asarray(np.random.default_rng(2).normal(size=problem["x"].shape), dtype)
    return problem, dy, scan_oracle.scan2d(problem, [order.indices(*grid) for order in orders], dy)


# With few programs each order gets one, and a result of its own where they overlap; with many, one adds them up.
TOGETHER, APART = 0, 10**6


@pytest.mark.parametrize(
    ("orders", "grid", "state", "rank", "channels", "enough"),
    [
        (ATROUS, (7, 5), 16, 3, 40, TOGETHER),
        (CROSS, (5, 4), 1, 17, 5, TOGETHER),
        (CROSS, (5, 4), 2, 1, 5, APART),
        (MIXED, (5, 7), 3, 2, 5, TOGETHER),
        (CHAINED, (5, 4), 2, 2, 5, TOGETHER),
        (CHAINED, (4, 5), 8, 1, 5, APART),
    ],
)
def test_scan2d_and_gradients(monkeypatch, orders, grid, state, rank, channels, enough):
    monkeypatch.setattr(images, "ENOUGH", enough)
    problem, dy, wanted = problem2d(orders, grid, state=state, rank=rank, channels=channels)
    actual = jit(scan2d(orders))(problem, dy)
    chex.assert_trees_all_equal_dtypes(actual, jax.tree.map(np.float32, wanted))
    close(actual, wanted, 2e-6)


def test_a_grid_smaller_than_the_step():
    problem, dy, wanted = problem2d(ATROUS, (1, 1), state=1, rank=1)
    close(jit(scan2d(ATROUS))(problem, dy), wanted, 2e-6)


@pytest.mark.parametrize("orders", [ATROUS, CROSS], ids=["atrous", "cross"])
def test_bfloat16_image(monkeypatch, orders):
    """Orders add up in float32: the only roundings are those of inputs, of results, and of products to 16 bits."""
    monkeypatch.setattr(images, "ENOUGH", 0)
    problem, dy, wanted = problem2d(orders, (3, 4), state=2, rank=1, dtype=jnp.bfloat16)
    y, gradients = jit(scan2d(orders))(problem, dy)
    wanted_y, wanted_gradients = wanted
    for rounded, exact in ((y, wanted_y), (gradients.pop("x"), wanted_gradients.pop("x"))):
        assert rounded.dtype == jnp.bfloat16
        assert (np.abs(np.asarray(rounded, np.float64) - exact) <= 2.0**-8 * np.abs(exact) + 1e-5).all()
    close(gradients, wanted_gradients, 1e-5)


def test_long_walks_keep_the_state_before_each_chunk():
    problem, dy, wanted = problem2d((Order(reverse=True),), (3, 27), state=16, rank=1)
    table = walks.walk_table((Order(reverse=True),), 3, 27, apart=False)
    assert table.tokens.shape[2] > 512 * 2 // 16  # more than one chunk
    close(jit(scan2d((Order(reverse=True),)))(problem, dy), wanted, 2e-6)


@pytest.mark.parametrize(
    ("length", "state", "groups", "share", "reverse", "softplus", "dtype"),
    [
        (21, 8, 2, 3, False, True, np.float32),
        (5, 3, 1, 3, True, False, np.float32),
        (1, 1, 1, 3, False, True, np.float32),
        (17, 1, 3, 3, True, True, jnp.bfloat16),
        (5, 1, 2, 128, False, True, np.float32),  # two channels a thread going forward, and two blocks of them
    ],
)
def test_selective_scan_and_gradients(length, state, groups, share, reverse, softplus, dtype):
    optional = ("D", "delta_bias", "initial_state")
    problem = scan_oracle.make_scan(
        3, length=length, state=state, groups=groups, share=share, optional=optional, softplus=softplus
    )
    narrow = {"u", "delta", "B", "C"}
    problem = {name: jnp.asarray(a, dtype if name in narrow else np.float32) for name, a in problem.items()}
    rng = np.random.default_rng(4)
    dy, d_final = (rng.normal(size=problem[name].shape).astype(np.float32) for name in ("u", "initial_state"))
    wanted = scan_oracle.scan(problem, softplus_delta=softplus, reverse=reverse, dy=dy, d_state=d_final)

    def split(x, axis):
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    @jit
    def program(p, dy, d_final):
        # As selective_scan.py does it: the form of contract.py.
        arrays = (
            *(split(p[name], 2) for name in ("u", "delta")),
            split(p["A"], 0).swapaxes(1, 2),
            *(p[name] for name in "BC"),
            *(split(p[name], 0) for name in ("D", "delta_bias")),
            split(p["initial_state"], 1).swapaxes(2, 3),
        )
        forward, backward = gpu.SELECTIVE_SCAN.passes(delta_softplus=softplus, reverse=reverse, interpret=True)
        y, final = forward(*arrays)
        cotangents = split(dy, 2), split(d_final, 1).swapaxes(2, 3)
        u, delta, A, B, C, D, bias, start = backward(arrays, cotangents)
        gradients = {
            "u": u.reshape(dy.shape),
            "delta": delta.reshape(dy.shape),
            "A": A.swapaxes(1, 2).reshape(p["A"].shape),
            "B": B,
            "C": C,
            "D": D.ravel(),
            "delta_bias": bias.ravel(),
            "initial_state": start.swapaxes(2, 3).reshape(d_final.shape),
        }
        return y.reshape(dy.shape), final.swapaxes(2, 3).reshape(d_final.shape), gradients

    actual = program(problem, dy, d_final)
    chex.assert_trees_all_equal_dtypes(actual[:2], (np.float32(0), np.float32(0)))
    chex.assert_trees_all_equal_dtypes(actual[2], problem)
    close(actual[:2], wanted[:2], 2e-6)
    rounded = {name for name in narrow if problem[name].dtype != np.float32}
    for names, tolerance in ((rounded, 2.0**-8), (problem.keys() - rounded, 2e-6)):
        close(*({name: of[2][name] for name in names} for of in (actual, wanted)), tolerance)


def test_under_vmap_checkpoint_and_shard_map():
    problem, _, (wanted, _) = problem2d(BOTH, (1, 6), state=2, rank=1)
    image, weights = problem["x"], [problem[name] for name in ARGUMENTS[1:]]

    def forward(x):
        return gpu.SCAN2D.passes(orders=BOTH, interpret=True)[0](x, *weights)[0]

    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = PartitionSpec("data")
    # Only the interpreter cannot be checked, which makes arrays that vary over no axis.
    sharded = jax.shard_map(jax.checkpoint(forward), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    close(jit(sharded)(image), wanted, 2e-6)
    close(jit(jax.vmap(forward))(image[:, None])[:, 0], wanted, 2e-6)


def test_channels_over_devices():
    """What each device projects to time step, B and C is summed, and so is the gradient of that."""
    problem, dy, wanted = problem2d(BOTH, (1, 6), state=2, rank=1, channels=6)
    last, second = PartitionSpec(None, None, None, "model"), PartitionSpec(None, "model")
    specs = dict.fromkeys(ARGUMENTS, second) | {"x": last, "dt_weight": PartitionSpec(None, None, "model")}
    sharded = jax.shard_map(
        scan2d(BOTH, axes=("model",)),
        mesh=Mesh(np.array(jax.devices()[:2]), ("model",)),
        in_specs=(specs, last),
        out_specs=(last, specs),
        check_vma=False,
    )
    close(jit(sharded)(problem, dy), wanted, 2e-6)


def test_the_table_of_a_worked_example():
    """A row of three pixels there and back, by one program: who comes to a pixel first, and who last."""
    table = walks.walk_table(BOTH, 1, 3, apart=False)
    codes = table.tokens[0, :, :3]
    assert (codes >> walks.BITS).tolist() == [[0, 1, 2], [2, 1, 0]]
    assert ((codes & walks.FIRST) != 0).tolist() == [[True] * 3, [False] * 3]
    assert ((codes & walks.LAST) != 0).tolist() == [[False] * 3, [True] * 3]
    assert (table.tokens[0, :, 3:] == walks.FILLER).all()
    assert (table.programs, table.layers, table.slots, table.merges) == (1, 1, 2, True)


@pytest.mark.parametrize(
    ("orders", "apart", "programs", "layers", "slots", "merges"),
    [(ATROUS, False, 4, 1, 1, False), (CROSS, False, 1, 1, 4, True), (CROSS, True, 4, 4, 4, False)],
)
def test_orders_that_share_no_pixel_run_side_by_side(orders, apart, programs, layers, slots, merges):
    table = walks.walk_table(orders, 6, 4, apart=apart)
    assert (table.programs, table.layers, table.slots, table.merges) == (programs, layers, slots, merges)


def test_what_is_not_supported_is_said():
    def reason(plan):
        return plan if isinstance(plan, str) else None

    def of_image(*shape, dtype=np.float32, weights=np.float32):
        like = functools.partial(jax.ShapeDtypeStruct, dtype=weights)
        arrays = [like((4, 8, 34)), like((4, 2, 8)), like((4, 8)), like((4, 8, 16)), like((4, 8))]
        return reason(gpu.SCAN2D.plan(jax.ShapeDtypeStruct(shape, dtype), *arrays, orders=CROSS))

    def of_sequence(length, state):
        u, A = (jax.ShapeDtypeStruct(s, np.float32) for s in ((1, length, 1, 8), (1, state, 8)))
        return reason(gpu.SELECTIVE_SCAN.plan(u, u, A, delta_softplus=True, reverse=False))

    assert "no GPU" in of_image(1, 4, 4, 8)
    with use_abstract_mesh(described(GPUS[0])):
        assert of_image(1, 4, 4, 8) is None
        assert "float64" in of_image(1, 4, 4, 8, dtype=np.float64)
        assert "float64" in of_image(1, 4, 4, 8, weights=np.float64)
        assert "65536" in of_image(1, 257, 256, 8)
        assert of_sequence(65536, 16) is None
        assert "64" in of_sequence(4, 64)


def described(gpu_name, devices=1):
    """Return a mesh of GPUs that are not there."""
    device = AbstractDevice(device_kind=gpu_name, num_cores=None, platform="gpu")
    return AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)


def test_the_platform_is_chosen_at_lowering():
    like, sets = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32), 4
    arguments = (
        *(like((2, 6, 4, 8)), like((sets, 8, 4)), like((sets, 2, 8)), like((sets, 8)), like((sets, 8, 1))),
        like((sets, 8)),
    )
    program = jax.jit(jax.grad(lambda *a: pallas_kernels.scan2d(*a, orders=CROSS).sum()))
    with use_abstract_mesh(described(GPUS[0])):
        assert "xla.gpu.triton" in program.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # Of no known GPU: portable.
    assert "xla.gpu.triton" not in program.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


GPUS = ["NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"]
# (orders, height, width, E, R, N) of models at 224 x 224.
SHAPES = {
    "evmamba_t stage 1": (ATROUS, 56, 56, 96, 3, 16),
    "evmamba_t stage 2": (ATROUS, 28, 28, 192, 6, 16),
    "vmamba_t stage 1": (CROSS, 56, 56, 96, 6, 1),
    "vmamba_t stage 2": (CROSS, 28, 28, 192, 12, 1),
    "vmamba_t stage 3": (CROSS, 14, 14, 384, 24, 1),
    "vmamba_t stage 4": (CROSS, 7, 7, 768, 48, 1),
    "vim_s": (BOTH, 1, 197, 768, 24, 16),
}


def lowered(function, gpu_name, *arguments):
    """Return what a program is lowered to on this machine for a GPU that it does not have."""
    with use_abstract_mesh(described(gpu_name)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


# All shapes, all GPUs, but not each with each: what is lowered hardly depends on the GPU.
@pytest.mark.parametrize(("shape", "name"), [(shape, GPUS[i % 3]) for i, shape in enumerate(SHAPES)])
def test_lowers_for_gpus_from_a_cpu(shape, name):
    orders, height, width, channels, rank, state = SHAPES[shape]
    like, sets = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32), len(orders)
    image = jax.ShapeDtypeStruct((128, height, width, channels), jnp.bfloat16)
    arguments = (
        image,
        like((sets, channels, rank + 2 * state)),
        like((sets, rank, channels)),
        like((sets, channels)),
        like((sets, channels, state)),
        like((sets, channels)),
    )
    forward, backward = gpu.SCAN2D.passes(orders=orders)
    for function, own in ((forward, arguments), (backward, (arguments, (image,)))):
        text = lowered(function, name, *own)
        assert text.count("__gpu$xla.gpu.triton") == 1
        assert "addptr" in text  # the names of Triton's operations can be read
        assert "atomic" not in text  # it would make sums depend on who comes first
        # Without JAX's private name it would be left out.
        assert ("ttg.maxnreg" in text) == (function is backward and rank <= 32)
        # No state and no step size for every token, of any direction.
        for kept in (f"x{channels}x{state}xf32", f"x{sets}x{channels}xf32"):
            assert f"128x{height * width}{kept}" not in text


def test_selective_scan_lowers_for_gpus_from_a_cpu():
    like = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    row, few, one = like((8, 196, 2, 100)), like((8, 196, 2, 16)), like((2, 100))
    arrays = (row, row, like((2, 16, 100)), few, few, one, one, like((8, 2, 16, 100)))
    forward, backward = gpu.SELECTIVE_SCAN.passes(delta_softplus=True, reverse=False)
    for function, own in ((forward, arrays), (backward, (arrays, (row, arrays[-1])))):
        text = lowered(function, GPUS[0], *own)
        assert text.count("__gpu$xla.gpu.triton") == 1


def test_lowers_sharded_with_its_axes_checked():
    problem, dy, _ = problem2d(BOTH, (1, 6), state=2, rank=1)
    mesh = described(GPUS[1], devices=2)

    def both(problem, dy):
        # As the caller's custom gradient has them: all vary over the same axes, so that gradients of parameters do too.
        arrays = [problem["x"], *(jax.lax.pcast(problem[name], ("data",), to="varying") for name in ARGUMENTS[1:])]
        forward, backward = gpu.SCAN2D.passes(orders=BOTH)
        return *forward(*arrays), *backward(arrays, (dy,))

    def sharded(problem, dy):
        data, everywhere = PartitionSpec("data"), PartitionSpec()
        specs = {name: data if name == "x" else everywhere for name in problem}
        results = (data,) * (1 + len(ARGUMENTS))
        return jax.shard_map(both, mesh=mesh, in_specs=(specs, data), out_specs=results)(problem, dy)

    with use_abstract_mesh(mesh):
        text = jax.jit(sharded).trace(problem, dy).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
