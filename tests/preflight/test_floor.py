"""The least time of a step: bytes and operations of small programs counted by hand, and the cut against all others."""

import itertools
import random

import jax
import jax.numpy as jnp
import pytest

from evmamba_jax import ops
from evmamba_jax.preflight import aot, floor, hlo
from evmamba_jax.preflight.floor import Floor, compare
from evmamba_jax.preflight.kernels import Scan
from evmamba_jax.preflight.parts import PARTS, instruction_parts, part_of
from evmamba_jax.preflight.work import Call, Work, count, minimum_cut, step_work
from evmamba_jax.training import parse_command
from pallas_kernels import CROSS, Order

IMAGES, TOKENS, WIDTH, HIDDEN = 8, 64, 16, 48


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def total(program, *arguments, **options):
    """Return what all parts of a step have to do."""
    work = Work()
    for one in count(jax.make_jaxpr(program)(*arguments), **options).values():
        work.add(one, 1)
    return work


def sgd(loss):
    """Return a step that moves the parameters, a tuple, against the gradient; the rate is a power of two."""

    def step(params, *inputs):
        grads = jax.grad(loss)(params, *inputs)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    return step


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def test_bytes_of_an_mlp_after_a_layer_norm():
    """bfloat16 but for the norm's two sums for each token, which are float32."""

    def loss(params, x):
        first, second = params
        hidden = layer_norm(x.astype(jnp.float32)).astype(jnp.bfloat16) @ first
        return jnp.square((jax.nn.silu(hidden) @ second).astype(jnp.float32)).sum()

    weights = (shape(WIDTH, HIDDEN), shape(HIDDEN, WIDTH))
    work = total(sgd(loss), weights, shape(IMAGES, TOKENS, WIDTH))
    tokens, matrix = IMAGES * TOKENS, 2 * WIDTH * HIDDEN
    forward = 2 * tokens * WIDTH + 2 * matrix  # the input, both matrices
    kept = 2 * (2 * 4 * tokens + 2 * tokens * HIDDEN + 2 * tokens * WIDTH)  # two sums, hidden, result
    backward = 2 * tokens * WIDTH + matrix  # the input once more; the second matrix, as the input has no gradient
    update = 2 * matrix * (2 + 1 + 1)  # gradients written and read, matrices read and written
    assert work.bytes == forward + kept + backward + update
    # Forward, both weights' gradients, and the gradient of the hidden layer.
    assert work.macs == 5 * tokens * WIDTH * HIDDEN


def test_bytes_of_a_block_with_a_scan():
    """The kernels' own traffic is not in them; what makes their arguments writes, what uses their results reads."""
    side, rank, state = 8, 2, 1

    def loss(params, x):
        (before, after), others = params
        y = ops.scan2d(jax.nn.silu(x @ before), *others, orders=CROSS)
        return jnp.sum((x + y @ after).astype(jnp.float32) ** 3)

    others = (4, WIDTH, rank + 2 * state), (4, rank, WIDTH), (4, WIDTH), (4, WIDTH, state), (4, WIDTH)
    others = tuple(shape(*sizes, dtype=jnp.float32) for sizes in others)
    matrices = (shape(WIDTH, WIDTH), shape(WIDTH, WIDTH))
    x = shape(IMAGES, side, side, WIDTH)
    work = count(jax.make_jaxpr(sgd(loss))((matrices, others), x))
    image, matrix = 2 * IMAGES * side**2 * WIDTH, 2 * WIDTH**2
    parameters = sum(4 * one.size for one in others)
    # x and the first matrix; the product kept, its SiLU for the kernel; y and x read again, the second matrix; x + y W
    # is kept.
    forward = image + matrix + 2 * image + 2 * image + matrix + image
    # x + y W and y for the second weight, whose gradient is kept, as that for the kernel is; the kernel's gradient, the
    # product and x for the first.
    backward = 2 * image + matrix + image + image + 2 * image
    update = 2 * matrix * (2 + 1 + 1) + parameters * 3  # the kernel writes gradients of its own parameters
    assert sum(one.bytes for one in work.values()) == forward + backward + update
    scans = sorted((str(scan), direction) for one in work.values() for scan, direction, *_ in one.scans)
    assert scans == [(f"8x8x8 E{WIDTH} R2 N1 cross", direction) for direction in ("backward", "forward")]


def test_a_scan_of_sequences_is_one_of_images_of_a_row():
    """A user's own model may call it; its groups are images apart, its steps are as wide as its input."""
    length, groups, state = 24, 2, 3
    sequence, weights = shape(IMAGES, length, WIDTH), shape(IMAGES, length, groups, state)
    A = shape(WIDTH, state, dtype=jnp.float32)

    def loss(params, u):
        delta, A, B, C = params
        return jnp.sum(ops.selective_scan(u, delta, A, B, C).astype(jnp.float32) ** 3)

    work = count(jax.make_jaxpr(sgd(loss))((sequence, A, weights, weights), sequence))
    calls = [call for one in work.values() for call in one.scans]
    assert sorted(call.direction for call in calls) == ["backward", "forward"]
    for scan, _, itemsize, times in calls:
        assert (scan.batch * scan.visits * scan.channels, scan.state) == (IMAGES * length * WIDTH, state)
        assert scan.batch * scan.visits * (scan.rank + 2 * scan.state) == IMAGES * length * (WIDTH + groups * 2 * state)
        assert (itemsize, times) == (2, 1)


def test_a_sum_over_all_images_ends_a_stage():
    """What a batch norm normalises is read once for its sums and once more, unlike what a layer norm does."""

    def normalised(axis):
        def program(x, weight):
            product = (x @ weight).astype(jnp.float32)
            return (product - product.mean(axis, keepdims=True)).astype(jnp.bfloat16)

        return program

    x, weight = shape(IMAGES * TOKENS, WIDTH), shape(WIDTH, WIDTH)
    image, matrix = 2 * IMAGES * TOKENS * WIDTH, 2 * WIDTH**2
    assert total(normalised(1), x, weight).bytes == image + matrix + image
    # Its sums are kept as well.
    assert total(normalised(0), x, weight).bytes == image + matrix + 2 * image + 2 * 4 * WIDTH + image


def test_operations():
    x = shape(IMAGES, TOKENS, dtype=jnp.float32)
    elements = IMAGES * TOKENS
    work = total(lambda x: jnp.maximum(jnp.exp(x) * 3 + x, 0), x)
    assert (work.vector, work.exponential) == (4 * elements, elements)
    work = total(lambda x: jax.nn.sigmoid(x).sum(1), x)
    assert (work.vector, work.exponential) == (3 * elements, 2 * elements)
    work = total(lambda x: x / 4 + x / (x + 1), x)
    assert (work.vector, work.exponential) == (4 * elements, elements)
    assert total(lambda x: x[:, ::2].T.astype(jnp.bfloat16), x).vector == 0


def test_a_convolution_and_its_gradients():
    """A stride of 2 halves both sides; the zeros that the image's gradient inserts are not multiplied."""

    def convolved(groups):
        def convolution(image, kernel):
            return jax.lax.conv_general_dilated(
                image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
            ).sum()

        return jax.grad(convolution, (0, 1))

    images, side, inside, outside = 4, 16, 8, 24
    result = images * (side // 2) ** 2
    work = total(convolved(1), shape(images, side, side, inside), shape(2, 2, inside, outside))
    assert work.macs == 2 * result * 4 * inside * outside
    work = total(convolved(inside), shape(images, side, side, inside), shape(2, 2, 1, inside))
    assert work.macs == 0
    # For each pixel of the image one product; for each weight a product and a sum for each result.
    sums = images * side**2 * inside
    assert work.vector == pytest.approx(sums + 2 * result * 4 * inside, rel=0.02)


def test_a_loop_counts_with_its_trips_and_a_branch_for_the_tpu():
    matrix = shape(WIDTH, WIDTH)

    def looped(x, weight):
        return jax.lax.scan(lambda x, _: (x @ weight, None), x, length=5)[0]

    assert total(looped, matrix, matrix).macs == 5 * WIDTH**3

    def branched(x, weight):
        return jax.lax.platform_dependent(x, weight, tpu=lambda x, w: x @ w @ w, default=lambda x, w: x @ w)

    assert total(branched, matrix, matrix).macs == 2 * WIDTH**3
    exact = total(lambda x, w: jnp.matmul(x, w, precision="highest"), matrix, matrix)
    assert exact.macs == 6 * WIDTH**3


def test_devices_may_divide_the_update():
    def loss(params, x):
        return (x @ params[0]).astype(jnp.float32).sum()

    arguments = (shape(WIDTH, WIDTH),), shape(IMAGES, WIDTH)
    whole, half = (total(sgd(loss), *arguments, update_share=share).bytes for share in (1, 0.5))
    assert whole - half == 0.5 * (3 * 2 * WIDTH**2)  # gradient and weight read, weight written


def test_the_cheapest_cut_of_all():
    """Against every set of nodes of small random graphs."""
    draw = random.Random(0)
    for _ in range(40):
        nodes = 8
        costs = [draw.randint(1, 9) for _ in range(nodes)]
        links = [(a, b) for a, b in itertools.combinations(range(nodes), 2) if draw.random() < 0.35]
        sources = sorted({node for node in range(nodes) if all(b != node for _, b in links)} | {draw.randrange(nodes)})
        needed = draw.sample(range(nodes), 2)

        def parts(cut, links=links, sources=sources, needed=needed):
            reached = set(sources) - cut
            for a, b in links:  # in order
                if a in reached and b not in cut:
                    reached.add(b)
            return not reached & set(needed)

        subsets = (set(s) for size in range(nodes + 1) for s in itertools.combinations(range(nodes), size))
        least = min(sum(costs[node] for node in cut) for cut in subsets if parts(cut))
        cut = set(minimum_cut(costs, sources, needed, links))
        assert parts(cut)
        assert sum(costs[node] for node in cut) == least


@pytest.mark.parametrize(("direction", "vector", "exponential"), [("forward", 13, 3), ("backward", 40, 4)])
def test_the_floor_of_a_scan(direction, vector, exponential):
    """One state: a v5e has 197e12 / 2 / 65536 cycles a second, and 655.2 GB/s of memory to be had."""
    scan = Scan(2, 4, 8, 16, 3, 1, (Order(),))
    cycles = 197e12 / 2 / 4 / 128**2
    elements = 2 * 4 * 8 * 16
    found = floor.ScanFloor.of([scan, scan], aot.GENERATIONS["v5e"], direction)
    assert found.vector == pytest.approx(2 * elements * vector / 4096 / cycles)
    assert found.exponentials == pytest.approx(2 * elements * exponential / 1024 / cycles)
    images, packed = 2 * elements, 4 * 2 * 4 * 8 * (3 + 2)
    assert found.bytes == 2 * (2 * images + packed if direction == "forward" else 3 * images + 2 * packed)
    assert found.hbm == pytest.approx(found.bytes / (0.8 * 819e9))
    assert found.binding == ("HBM", found.hbm)


def test_kernels_and_the_rest_of_a_part_do_not_overlap():
    scan = Scan(2, 4, 8, 16, 3, 16, (Order(),))
    generation = aot.GENERATIONS["v6e"]
    work = {"scans": Work(macs=1e12, bytes=1e6, scans=[Call(scan, "forward", 2, 3)]), "norms": Work(bytes=1e9)}
    found = floor.floors(work, generation)
    kernel = floor.ScanFloor.of([scan], generation, "forward").binding[1]
    assert found["scans"].kernels == pytest.approx(3 * kernel)
    assert found["scans"].seconds == pytest.approx(3 * kernel + 2e12 / 918e12)
    assert (found["scans"].set_by, found["norms"].set_by) == ("matrix", "memory")


def test_parts_of_chains():
    linear, mlp = ("/opt/site-packages/flax/nnx/nn/linear.py", 170), ("/home/me/clone/evmamba_jax/layers/mlp.py", 44)
    norm = ("/opt/site-packages/flax/nnx/nn/normalization.py", 99)
    blocks, script = ("/home/me/clone/evmamba_jax/layers/blocks.py", 60), ("/home/me/run.py", 18)
    assert part_of([linear, mlp, blocks, script]) == "MLP"
    assert part_of([norm, mlp, blocks, script]) == "norms"
    assert part_of([linear, blocks, script]) == "projections"
    assert part_of([linear, script]) == "other"
    assert part_of([]) == "other"


COMPILED = """HloModule jit_step

ENTRY %main (x: f32[8,16], y: f32[16,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[16,16]{1,0} parameter(1)
  %copied = f32[8,16]{1,0} copy(%x)
  %product = f32[8,16]{1,0} dot(%copied, %y), metadata={source_file="/a/evmamba_jax/layers/mlp.py" source_line=9}
  %moved = f32[8,16]{1,0} copy(%product)
  %sum = f32[8]{0} reduce(%moved), metadata={source_file="/a/flax/nnx/nn/normalization.py" source_line=9}
  %apart = f32[8]{0} iota(), iota_dimension=0
  ROOT %out = f32[8,16]{1,0} add(%apart, %sum)
}
"""


def test_what_the_compiler_adds_belongs_to_its_neighbours():
    parts = instruction_parts(hlo.parse(COMPILED))
    assert {name: part for name, part in parts.items() if part == "MLP"}.keys() == {
        "x",
        "y",
        "copied",
        "product",
        "moved",
    }
    assert {name: part for name, part in parts.items() if part == "norms"}.keys() == {"sum", "out", "apart"}


def test_times_beside_floors():
    least = {
        "norms": Floor(0.0, {"matrix": 0.0, "memory": 2.0, "vector": 1.5, "exponential": 0.0}),
        "scans": Floor(3.0, {"matrix": 0.0, "memory": 0.5, "vector": 0.0, "exponential": 0.0}),
        "MLP": Floor(0.0, {"matrix": 4.0, "memory": 2.5, "vector": 0.0, "exponential": 0.0}),
    }
    times = [("norms", 1.0), ("scans", 7.0), ("norms", 2.0), ("other", 1.0)]
    rows = compare([{"part": part, "seconds": seconds} for part, seconds in times], least)
    assert [tuple(row) for row in rows] == [
        ("norms", 3.0, 2.0, "memory"),
        ("scans", 7.0, 3.5, "kernels"),
        ("MLP", 0.0, 4.0, "matrix"),
        ("other", 1.0, 0.0, ""),
        ("all", 11.0, 9.5, "matrix"),
    ]
    assert [row.ratio for row in rows] == [1.5, 2.0, 0.0, None, 11 / 9.5]


SMALL = {
    "evmamba_t": ({"width": 16, "depths": (1, 0, 1, 0)}, {"stem", "depthwise", "squeeze-excite", "MLP"}),
    "vmamba_t": ({"width": 16, "depths": (1, 0, 0, 0)}, {"stem", "depthwise", "MLP"}),
    "vim_s": ({"width": 16, "depth": 1}, {"stem", "depthwise"}),
    "msvmamba_t": ({"width": 16, "depths": (1, 0, 0, 0)}, {"stem", "depthwise", "squeeze-excite"}),
    "mambavision_t": ({"width": 16, "depths": (1, 0, 2, 0)}, {"stem", "depthwise", "MLP", "attention"}),
}


@pytest.mark.parametrize("model", SMALL)
def test_every_operation_of_a_step_has_a_part(model):
    options, own = SMALL[model]
    config, _ = parse_command(["train_tpu.py", "--config", f"configs/{model}.py"])
    config.batch_size = 16
    config.model.options = config.model.options | options
    work = step_work(config, devices=2)
    everywhere = {"augmentation", "norms", "projections", "scans", "head", "optimizer"}
    assert set(work) - {"other"} == everywhere | own
    for limit in ("macs", "bytes", "vector", "exponential"):
        amounts = {part: getattr(one, limit) for part, one in work.items()}
        assert amounts.get("other", 0) < 0.03 * sum(amounts.values()), amounts
    assert {part for part, one in work.items() if one.scans} == {"scans"}
    assert list(work) == [part for part in PARTS if part in work]
