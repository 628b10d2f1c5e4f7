"""What the compiler costs before the first step: CPU seconds, blocks in loops against blocks one by one.

Each figure is the CPU time of a process of its own, without its imports, at XLA's default optimisation level and
without a cache of compiled programs; batch 2, 224x224 pixels, float32. ``digits`` is the command up to its
first step, imports included. Two cases draw initial values as JAX does, with a program for every shape: the peers of
``digits`` and of ``create``.

    python benchmarks/compile_time.py [--only NAME ...] [--out FILE]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report

ROOT = Path(__file__).parents[1]
# Name: what is measured, its model, its remat, and the case before it that it is compared with.
CASES = {
    "create_shapes": ("create_model, JAX drawing every shape", "evmamba_t", "none", None),
    "create": ("create_model", "evmamba_t", "none", "create_shapes"),
    "vim_unrolled": ("gradient", "vim_t", "none", None),
    "vim_gradient": ("gradient", "vim_t", "block", "vim_unrolled"),
    "vmamba_unrolled": ("gradient", "vmamba_t", "none", None),
    "vmamba_gradient": ("gradient", "vmamba_t", "block", "vmamba_unrolled"),
    "vim_eval_unrolled": ("evaluation, blocks one by one", "vim_t", "none", None),
    "vim_eval": ("evaluation", "vim_t", "none", "vim_eval_unrolled"),
    "digits_shapes": ("digits to step 1, JAX drawing every shape", "digits", "none", None),
    "digits": ("digits to step 1", "digits", "none", "digits_shapes"),
}


@contextlib.contextmanager
def _by_shape():
    """Draw initial values as JAX does, with a program for every shape."""
    import jax
    import jax.numpy as jnp

    from evmamba_jax.layers import initializers

    initializers._uniform, drawn = jax.random.uniform, initializers._uniform
    initializers.full, filled = lambda shape, value, dtype=jnp.float32: jnp.full(shape, value, dtype), initializers.full
    yield
    initializers._uniform, initializers.full = drawn, filled


def measure(name: str) -> float:
    """Return the CPU seconds of one case, in this process."""
    what, model, remat, _ = CASES[name]
    if name.startswith("digits"):
        return _digits(name)
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from evmamba_jax import create_model
    from evmamba_jax.arrays import merge, split
    from evmamba_jax.layers import blocks
    from evmamba_jax.models import abstract_model

    jax.block_until_ready(jnp.zeros(1) + 1)  # the back end is up
    if name.startswith("create"):
        with _by_shape() if name.endswith("shapes") else contextlib.nullcontext():
            began = time.process_time()
            create_model(model, rngs=nnx.Rngs(0))
            return time.process_time() - began
    if name == "vim_eval_unrolled":
        blocks.FEWEST = sys.maxsize
    built = abstract_model(model, remat=remat)
    if what == "gradient":
        built.train()
    graphdef, params, stats = split(built)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)

    def forward(params, stats, images):
        return merge(graphdef, params, stats)(images).sum()

    program = jax.grad(forward) if what == "gradient" else forward
    began = time.process_time()
    jax.jit(program).lower(params, stats, images).compile()
    return time.process_time() - began


def _digits(name: str) -> float:
    from evmamba_jax.reports.writer import Reporter
    from evmamba_jax.training import parse_command, run

    def stop(*_):
        raise SystemExit

    Reporter.log_train = stop  # the first step has been made
    with tempfile.TemporaryDirectory() as folder, _by_shape() if "shapes" in name else contextlib.nullcontext():
        command = ["train_tpu.py", "--config", "configs/digits.py", "--config.log_every.steps=1"]
        config, workdir = parse_command([*command, "--workdir", folder])
        with contextlib.suppress(SystemExit):
            run(config, workdir)
    return time.process_time()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    report = Report(
        "CPU seconds before the first step",
        options.out,
        machine=machine.cpu(),
        versions=machine.versions("Python", "jax", "jaxlib", "flax"),
        date=machine.today(),
    )
    report.text(
        "CPU seconds of a process for tracing, lowering and compiling (gradient, evaluation), for the call "
        "(create_model), or for the command up to step 1 (digits). Batch 2, 224x224, float32. Ratio: the other form "
        "over it."
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": str(ROOT),
    }
    report.table("what", "model", "remat", ("CPU s", "{:.2f}"), ("ratio", "{:.1f}"))
    seconds = {}
    for name in options.only:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        seconds[name] = json.loads(done.stdout.splitlines()[-1])
        what, model, remat, peer = CASES[name]
        report.row(what, model, remat, seconds[name], seconds[peer] / seconds[name] if peer in seconds else None)


if __name__ == "__main__":
    main()
