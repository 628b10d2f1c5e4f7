"""Reading of optimized HLO: texts in the form that libtpu 0.0.42 and 0.0.52 write, figures worked out by hand."""

from pathlib import Path

import pytest

from evmamba_jax.preflight import hlo

STEP = (Path(__file__).parent / "recorded" / "step_hlo.txt").read_text()


@pytest.fixture(scope="module")
def step():
    return hlo.parse(STEP)


@pytest.mark.parametrize(
    ("text", "size", "padded", "in_hbm"),
    [
        ("f32[8,784,4,16]{3,2,1,0:T(4,128)}", 8 * 784 * 4 * 16 * 4, 8 * 784 * 4 * 128 * 4, True),
        # Width on the lanes, height on the sublanes: two numbers of 16 bits share a register's 32.
        ("bf16[8,224,224,3]{2,1,3,0:T(8,128)(2,1)}", 8 * 224 * 224 * 3 * 2, 8 * 3 * 224 * 256 * 2, True),
        # The trap: a last axis of one number takes a whole row of 128.
        ("bf16[128,3136,1]{2,1,0:T(8,128)(2,1)}", 128 * 3136 * 2, 128 * 3136 * 128 * 2, True),
        ("bf16[128,3136,1]{0,2,1:T(8,128)(2,1)}", 128 * 3136 * 2, 3136 * 8 * 128 * 2, True),
        ("f32[48]{0:T(128)}", 192, 512, True),
        ("f32[]{:T(128)}", 4, 512, True),
        ("pred[3]{0:T(512)(128)(4,1)}", 3, 512, True),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 4096, 4096, False),
        ("f32[8,96]", 3072, 3072, True),
        ("c64[2]", 16, 16, True),
        ("f8e4m3fn[4]", 4, 4, True),
    ],
)
def test_bytes_of_an_array(text, size, padded, in_hbm):
    (array,) = hlo.arrays(text)
    assert (array.size, array.padded, array.in_hbm) == (size, padded, in_hbm)


def test_loops_multiply(step):
    runs, unknown = hlo.runs(step)
    times = {run.instruction.name: run.times for run in runs}
    assert times["wide"] == 1
    assert times["all-reduce.7"] == 49
    assert times["f"] == 49 * 14
    assert unknown == ["r"]  # it ends when a random number pleases


def test_known_trip_count_comes_first():
    text = STEP.replace("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}')
    runs, _ = hlo.runs(hlo.parse(text))
    assert {run.instruction.name: run.times for run in runs}["f"] == 5 * 14


def test_collectives(step):
    runs, _ = hlo.runs(step)
    each = list(hlo.collectives(step, runs, devices=8, slices=2))
    found = {(c.kind, c.source): c for c in each if c.size != 24 * 128 * 4}
    reduced = found["all-reduce", "evmamba_jax/layers/mlp.py:44"]
    assert (reduced.size, reduced.group, reduced.times, reduced.between_slices) == (8 * 96 * 4, 4, 49, False)
    assert reduced.moved == 8 * 96 * 4 * 2 * 3 / 4  # a ring sends everything but a share twice
    gathered = found["all-gather", ""]
    assert (gathered.size, gathered.group) == (16 * 96 * 4, 2)
    assert gathered.between_slices  # [4,2]<=[2,4]T(1,0): the first group is 0 and 4
    scattered = found["reduce-scatter", ""]
    assert (scattered.size, scattered.group) == (64 * 128 * 4, 8)
    permuted = found["collective-permute", ""]
    assert (permuted.size, permuted.between_slices, permuted.moved) == (8 * 96 * 4, True, 8 * 96 * 4)
    meshed = found["all-reduce", ""]
    assert (meshed.group, meshed.between_slices) == (2, True)  # 0 and 4 differ along the first axis
    (through_hosts,) = (c for c in each if c.size == 24 * 128 * 4)  # libtpu sends it to the hosts' network runtime
    assert (through_hosts.kind, through_hosts.group, through_hosts.between_slices) == ("all-reduce", 2, True)
    assert len(each) == 6


def test_largest_buffers_and_their_places(step):
    runs, _ = hlo.runs(step)
    first, second, *rest = hlo.buffers(step, runs)
    assert (first.array.text, first.array.padded) == ("f32[128,3136,1]", 128 * 3136 * 128 * 4)
    assert first.source == "pallas_kernels/sequential.py:33"
    assert (second.array.text, second.count) == ("bf16[8,224,224,3]", 1)
    assert second.source == "evmamba_jax/layers/mlp.py:44"  # ours, not the library's that it called
    assert not any("1024" in buffer.array.text for buffer in rest)  # that one stays on the chip


def test_the_calls_that_led_to_an_instruction(step):
    runs, _ = hlo.runs(step)
    chains = {run.instruction.name: step.chain(run.instruction) for run in runs}
    library, ours, script = (
        ("/opt/site-packages/flax/nnx/nn/linear.py", 170),
        ("/home/me/clone/evmamba_jax/layers/mlp.py", 44),
        ("/home/me/run.py", 18),
    )
    assert chains["wide"] == [library, ours, script]
    assert chains["narrow"] == [("/home/me/clone/pallas_kernels/sequential.py", 33)]  # written out, not numbered
    assert chains["permuted"] == []


def test_arguments_and_kernels(step):
    runs, _ = hlo.runs(step)
    (name,) = hlo.arguments(step)
    assert name == "state['model']['params']['head.kernel']"
    assert hlo.pallas_calls(runs) == [("kernel.3", ["f32[4,8,128]", "f32[8,128]"], 1)]
