"""The pre-flight check as a command: what it refuses, what it reports, what it exports."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evmamba_jax.data.sources import describe
from evmamba_jax.errors import UserError
from evmamba_jax.preflight import __main__ as command
from evmamba_jax.preflight import aot, gpu, program
from evmamba_jax.preflight.clock import UNCERTAINTY, Timed
from evmamba_jax.preflight.program import Request
from evmamba_jax.preflight.report import needed, report, step_bounds, step_time
from evmamba_jax.training import parse_command

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "training" / "tiny.py")
# Without the draws of mixing, whose loops take the compiler longest.
SMALL = ["--config", TINY, "--config.data.mixup=0", "--config.data.cutmix=0", "--config.batch_size=16"]


def refused(capsys, *arguments, stages=False) -> str:
    """Run the command in this process, check that it is refused in one line, and return the line."""
    assert command.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert not out
    lines = err.strip().splitlines()
    assert len(lines) == 1 or stages  # those of the other process's progress come before
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", TINY], "--topology is missing"),
        (["--config", TINY, "--topology", "v5e-7"], "--topology: there is no topology 'v5e-7': v5e-N counts chips"),
        (["--config", TINY, "--topology", "v9-8"], "--topology: unknown topology 'v9-8'; there are v4-N"),
        (["--config", TINY, "--topology", "h100-9"], "'h100-9' is not h100-N with N from 1 to 8 or a multiple of 8"),
        (["--config", TINY, "--topology", "h100-x"], "'h100-x' is not h100-N"),
        (["--topology", "v5e-8"], "--config (not given)"),
        (["--config", "configs/none.py", "--topology", "v5e-8"], "there is no file configs/none.py"),
        (["--config", TINY, "--topology", "v5e-8", "--config.optim.lrr=1"], "did you mean 'optim.lr'"),
        (["--config", TINY, "--topology", "v5e-8", "--fats"], "Unknown command line flag 'fats'"),
        (["--config", TINY, "--topology", "v5e-8", "--config.batch_size=0"], "config.batch_size=0 is not allowed"),
        (["--config", TINY, "--topology"], "expected one argument"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_export_to_nowhere(capsys, tmp_path):
    pytest.importorskip("flatbuffers", reason="--export needs flatbuffers: pip install -e '.[preflight]'")
    target = tmp_path / "none" / "step"
    assert f"--export {target} cannot be written" in refused(
        capsys, "--config", TINY, "--topology", "v5e-8", "--export", str(target)
    )


def test_a_machine_that_is_too_small(capsys, monkeypatch):
    monkeypatch.setattr(command.machine, "free_memory", lambda: 0.4e9)
    line = refused(capsys, "--config", TINY, "--topology", "v5e-8")
    assert "this machine is too small: 0.4 GB of memory are free" in line


def test_a_compiler_that_is_killed():
    progress = command._Progress(os.getpid())
    progress.stage, progress.peak = "compiling for 8 devices", 3e9
    line = command._death(-signal.SIGKILL, progress, "")
    assert "this machine is too small: the compiler was killed at 3.0 GB while compiling for 8 devices" in line
    assert command._death(1, progress, "a\nTypeError: b\n").endswith(
        "with code 1 while compiling for 8 devices: TypeError: b"
    )


def test_without_the_compilers(monkeypatch):
    """As on a machine where neither libtpu nor the CUDA plugin is installed; the process answers with the message."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(aot, "_prepared", [])
    for topology, message in (
        ("v5e-8", 'the TPU compiler is not installed: pip install "jax[tpu]"'),
        ("h100-8", "the GPU compiler is not installed: pip install jax-cuda13-plugin=="),
    ):
        with pytest.raises(ImportError) as caught:
            program.step_facts(Request(SMALL, topology), lambda **words: None, "nowhere")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_mistake_in_the_other_process_is_told_in_one_line(capsys):
    line = refused(capsys, *SMALL, "--config.mesh.fsdp=3", "--topology", "v5e-8", stages=True)
    assert "config.mesh is data=-1, fsdp=3; their product must be the 8 devices" in line


def test_data_that_is_nowhere(tmp_path):
    config, _ = parse_command(["x", "--config", TINY, f"--config.data.data_dir={tmp_path}"])
    names, examples, _ = describe(config.data)
    assert (len(names), examples) == (10, 1437)
    config.data.name = "imagenet2012:5.1.0"
    assert describe(config.data) == (tuple(map(str, range(1000))), 1_281_167, "known without the data")
    config.data.name = "flowers"
    with pytest.raises(UserError, match="data.name='flowers' is not prepared in .*, so its classes are not known"):
        describe(config.data)


@pytest.mark.parametrize(
    ("message", "bytes_needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (96.99G) exceeds available HBM (15.75G). HLO module: jit_train_step.\nSee https://openxla.org",
            96.99 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.9G of 15.75G hbm. Exceeded hbm "
            "capacity by 9.15G.\n\nTotal hbm usage >= 25.1G:",
            24.9 * 2**30,
        ),
        ("INTERNAL: Mosaic failed to compile TPU kernel: bad slice\n\nat ...", None),
    ],
)
def test_refusals_of_the_compiler(message, bytes_needed):
    facts = {
        **{"model": "evmamba_t", "image": [224, 224, 3], "dtype": "bfloat16", "data": "digits", "accumulation": 1},
        **{"devices": 8, "generation": "v5e", "chips": 8, "hosts": 1, "slices": 1, "mesh": {"data": 8, "fsdp": 1}},
        **{
            "platform": "tpu",
            "batch_size": 64,
            "versions": {},
            "trace_seconds": 1,
            "compile_seconds": 1,
            "peak_rss": 1e9,
        },
        "available": 15.75 * 2**30,
    }
    refusal = program.refusal(message)
    assert refusal["needed"] == (bytes_needed and int(bytes_needed))
    assert "\n" not in refusal["line"]
    text = report(facts | {"refusal": refusal}, fast=False)
    assert (f"DOES NOT FIT: {bytes_needed / 2**30:.2f} GiB" if bytes_needed else "DOES NOT COMPILE") in text
    assert needed(facts | {"refusal": refusal}) > facts["available"]


def timed(kind: str, seconds: float, **others: Any) -> dict[str, Any]:
    """Return an instruction's time, as the process that compiles tells it."""
    item = Timed(
        kind, kind, 1, seconds, seconds, 0, 0.0, True, "VALU", 0.9, 0, 0, "forward", "a.py:1", "jit(f)/add", "other"
    )
    return dataclasses.asdict(item) | others


def test_the_time_of_a_step_is_the_sum_of_its_parts():
    inside = {"times": 10, "moved": 2e6, "between_slices": False}
    facts = {
        "link_bandwidth": 1e9,
        "collectives": [inside, inside | {"between_slices": True}],
        "times": [
            *(timed("elementwise", 2e-3), timed("matrix products", 1e-3), timed("kernels", 3e-3)),
            timed("transfers", 1e-3, schedule=None, memory=5e-3),
        ],
    }
    parts = step_time(facts)
    assert parts == pytest.approx({"XLA": 4e-3, "kernels": 3e-3, "transfers": 4e-3, "exchanges": 20e-3})
    assert step_bounds(parts) == pytest.approx((20e-3, 31e-3))  # exchanges take longest, or nothing is hidden


def test_the_largest_batch_in_words(monkeypatch):
    """The search through the command, with a compiler that answers at once."""

    def compiled(request, *, fast):
        asked.append(request.batch_per_device)
        return facts | {"memory": facts["memory"] | {"temporaries": request.batch_per_device * 2**27}}

    asked: list[int] = []
    memory = {"arguments": 2**30, "temporaries": 64 * 2**27, "code": 0, "kept_outputs": 0}
    facts = {"devices": 8, "accumulation": 2, "batch_size": 512, "available": 16 * 2**30, "memory": memory}
    monkeypatch.setattr(command, "inspect", compiled)
    text = command._find_batch(Request([], "v5e-8"), facts, fast=True)
    assert "112 a device, config.batch_size=896 (15.00 of 16.00 GiB; 128 do not" in text
    assert 64 not in asked  # that one is known


def test_what_is_exported_does_what_the_step_does():
    """A setup of a toy's step, exported for the CPU, read back and run on four devices."""
    pytest.importorskip("flatbuffers", reason="--export needs flatbuffers: pip install -e '.[preflight]'")
    mesh = toy_mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())

    def step(state, batch):
        return {"w": state["w"] + batch["x"].T @ batch["x"], "step": state["step"] + 1}

    class Toy:
        mesh = toy_mesh
        shardings = {"w": split, "step": whole}  # noqa: RUF012

        def step(self):
            shape = jax.ShapeDtypeStruct
            state = {"w": shape((8, 8), "float32", sharding=split), "step": shape((), "int32", sharding=whole)}
            return step, (state, {"x": shape((16, 8), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))})

    setup: Any = Toy()
    read = jax.export.deserialize(bytearray(program.exported(setup, "cpu")))
    x, w = np.arange(128.0, dtype=np.float32).reshape(16, 8), np.eye(8, dtype=np.float32)
    arguments = jax.device_put(
        ({"w": w, "step": np.int32(3)}, {"x": x}), jax.tree.map(lambda a: a.sharding, setup.step()[1])
    )
    count, total = jax.jit(read.call)(jax.tree.leaves(arguments))
    assert int(count) == 4
    np.testing.assert_allclose(np.asarray(total), w + x.T @ x)
    assert total.sharding.is_equivalent_to(split, 2)


def test_a_step_compiled_for_eight_chips(tmp_path):
    """The whole way, with the real compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[tpu]'")
    arguments = [*SMALL, "--config.accumulation=2", "--config.mesh.fsdp=2", "--topology", "v5e-8", "--fast"]
    can_export = importlib.util.find_spec("flatbuffers") is not None
    if can_export:
        arguments += ["--export", str(tmp_path / "step")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-m", "evmamba_jax.preflight", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=500,
        check=False,
    )
    out, err = done.stdout, done.stderr
    assert done.returncode == 0, out + err
    for words in (
        "evmamba_t, 8x8x1, float32, on 8 devices of v5e (8 chips; mesh data=4, fsdp=2)",
        "batch 16, 2 a device in 2 rounds; digits: 10 classes",
        "Nothing ran",
        "COMPILES AND FITS: ",
        " of 15.75 GiB of a device",
        "optimizer",
        "Largest arrays",
        "Pallas kernels, those that take longest first",
        "Lines whose instructions take longest",
        "all-reduce",
        "Time of a step (estimate): ",
        "images/s",
        UNCERTAINTY,
        "Parts of the step",
        "  all  ",
    ):
        assert words in out, words
    assert "compiling for 8 devices" in err  # progress
    assert "Traceback" not in out + err
    if can_export:
        read = jax.export.deserialize(bytearray((tmp_path / "step").read_bytes()))
        assert (read.nr_devices, read.platforms) == (8, ("tpu",))
        assert "16x8x8x1xui8" in read.mlir_module()  # the batch


def test_gpu_names():
    assert gpu.is_gpu("h100-8")
    assert not gpu.is_gpu("v5e-8")
    assert gpu.parse_name("a100") == ("a100", 1)
    assert gpu.parse_name("h200-16") == ("h200", 16)


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for word in ("--topology", "--fast", "--find-batch", "--export", "v5e-256"):
        assert word in out
