"""Training speed on the GPU at hand: our EfficientVMamba-T, which was not measured yet, and the official one.

    python benchmarks/gpu_train.py [--official CLONE] [--batch 128 256] [--scans auto sequential] [--compile]
                                   [--runs 20] [--limit 600] [--out FILE]
    JAX_PLATFORMS=cpu python benchmarks/gpu_train.py --batch 2 --runs 5     # our step runs on any machine

``CLONE`` is a clone of TerryPei/EfficientVMamba, whose ``classification/models/vmamba_efficient.py`` its ``main.py``
trains; it needs PyTorch, timm, einops, and the CUDA scan ``selective_scan_cuda_core`` of that clone or
``selective_scan_cuda`` of mamba-ssm. What is not installed is left out. Each row has a process of its own.

A step is forward, backward, clipping, AdamW and moving average as in ``configs/evmamba_t.py``, 224 px, from random
images that are on the GPU already. Ours is the step of ``train_tpu.py``: it also normalises, erases and mixes the
images and keeps the books. The official code is given normalised images and soft targets that are ready, no loss is
read back, there is no loss scaling, and its moving average is one call where its own trainers loop: all in its favour.

Both compute in bfloat16 from float32 parameters. Our scans read and write bfloat16 images and recur in float32. The
official code, under autocast, casts all that its scan reads (u, delta, A, B, C, D, bias) to float32 and gets float32
back, whatever its kernel could take; what LayerNorm gives and the loss are float32 by autocast's own rules.
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

from lib.timing import groups

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report

ROOT = Path(__file__).parents[1]
SIDE, CLASSES, EXAMPLES = 224, 1000, 1_281_167
WARM_UP, GROUP = 3, 5
DEVICE = "cuda"  # of PyTorch
# Modules of ours for what nothing here does, with stand-ins in their place: so their libraries need not be installed.
UNUSED = (
    *("data.loader", "data.sources", "training.command", "training.loop"),
    *("reports.confusion", "reports.curves", "reports.predictions"),
)
LEARNING_RATE, DECAY, DROP_PATH, CLIP, AVERAGE = 1e-7, 0.04, 0.1, 1.0, 0.9999  # the first step's, as the config has it
MODULE = "classification/models/vmamba_efficient.py"


def ours(scans, batch, runs):
    """Return the facts of our train step with the scans of an implementation, or "auto"."""
    for name in UNUSED:
        sys.modules[f"evmamba_jax.{name}"] = mock.MagicMock()
    import jax
    import numpy as np
    from flax import nnx

    from configs.evmamba_t import get_config
    from evmamba_jax.layers.s6 import S6
    from evmamba_jax.tasks import task_of
    from evmamba_jax.training import mesh
    from evmamba_jax.training.setup import Setup

    chosen = set()
    logger = logging.getLogger("pallas_kernels.dispatch")
    logger.setLevel(logging.DEBUG)
    logger.addFilter(lambda record: chosen.add(record.getMessage().split(": ", 1)[-1]))

    config = get_config()
    config.batch_size = batch
    task = task_of(config)(config, list(map(str, range(CLASSES))))
    if scans != "auto":
        for _, part in nnx.iter_modules(task.model):
            if isinstance(part, S6):
                part.implementation = scans
    setup = Setup(task, mesh.make_mesh(config, jax.devices()[:1]), EXAMPLES)
    compiled = setup.lower().compile()
    rng = np.random.default_rng(0)

    def value(path, array):
        """Return something like an initial value: to draw the real ones would take as long to compile as the step."""
        kind, name = path[0].name, jax.tree_util.keystr(path, simple=True)
        if kind in ("model", "ema") and array.ndim > 1:
            return rng.standard_normal(array.shape, np.float32) * (array.shape[-1] / array.size) ** 0.5
        return np.full(array.shape, kind in ("model", "ema") and name.endswith(("scale", "var")), array.dtype)

    state = jax.device_put(jax.tree_util.tree_map_with_path(value, setup.abstract_state), setup.shardings)
    arrays = {
        "image": rng.integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8),
        "label": rng.integers(0, CLASSES, batch, np.int32),
        "corrupt": np.zeros(batch, np.int32),
    }
    rows = jax.device_put(arrays, mesh.batch_sharding(setup.mesh))

    def step():
        nonlocal state
        state = compiled(state, rows)

    times = groups(step, lambda: jax.block_until_ready(state), warm_up=WARM_UP, size=GROUP, runs=runs)
    return {
        "times": times,
        "peak": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0),
        "loss": float(state.last["loss"]),
        "parameters": sum(x.size for x in state.model.params.values()),
        "device": jax.devices()[0].device_kind,
        "scans": ", ".join(sorted(chosen)),
    }


def official_module(clone):
    """Import the official file, with stand-ins for counters of FLOPs and names for what has moved since."""
    if importlib.util.find_spec("fvcore") is None:
        sys.modules["fvcore"] = sys.modules["fvcore.nn"] = mock.MagicMock()
    for old, new in {"timm.models.layers": "timm.layers", "timm.models.registry": "timm.models"}.items():
        if importlib.util.find_spec(old) is None:
            sys.modules[old] = importlib.import_module(new)
    try:  # under the name that its author gave the folder on his machine
        sys.modules["selective_scan_vmamba_pt202"] = types.SimpleNamespace(
            selective_scan_cuda_core=importlib.import_module("selective_scan_cuda_core")
        )
    except ImportError as error:
        print(f"no selective_scan_cuda_core, so the official code takes mamba-ssm's: {error}", file=sys.stderr)
    sys.path.insert(0, str(Path(clone) / "classification"))
    spec = importlib.util.spec_from_file_location("vmamba_efficient", Path(clone) / MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official(clone, how, batch, runs):
    """Return the facts of the official model's train step, "eager" or through ``torch.compile``."""
    import torch

    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of names that have moved
        module = official_module(clone)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as its trainers have it
    # The last two as in the released yaml file; the constructor's own differ.
    model = module.EfficientVSSM(
        dims=48, depths=[2, 2, 4, 2], drop_path_rate=DROP_PATH, mlp_ratio=0.0, downsample_version="v1"
    ).to(DEVICE)
    run = torch.compile(model) if how == "torch.compile" else model
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
    parameters = groups[True] + groups[False]
    adamw = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": DECAY}, {"params": groups[False], "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    now = [x for x in model.state_dict().values() if x.is_floating_point()]
    averages = [x.clone() for x in now]
    images = torch.randn(batch, 3, SIDE, SIDE, device=DEVICE)
    targets = torch.rand(batch, CLASSES, device=DEVICE).softmax(1)
    loss = None

    def step():
        nonlocal loss
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(run(images).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        adamw.step()
        adamw.zero_grad()
        torch._foreach_lerp_(averages, now, 1 - AVERAGE)

    model.train()
    return {
        "times": groups(
            step,
            torch.cuda.synchronize,
            warm_up=WARM_UP,
            size=GROUP,
            runs=runs,
            reset=torch.cuda.reset_peak_memory_stats,
        ),
        "peak": torch.cuda.max_memory_allocated(),
        "loss": loss.item(),
        "parameters": sum(x.numel() for x in parameters),
        "device": torch.cuda.get_device_name(),
        "scans": {"sscore": "selective_scan_cuda_core"}.get(module.SSMODE, module.SSMODE),
    }


def in_process(limit, *row):
    """Return the facts of a row, or why there are none."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--one", json.dumps(row)]
    try:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {limit} s"}
    if done.returncode:
        return {"failure": f"failed with code {done.returncode}"}
    facts = json.loads(done.stdout.splitlines()[-1])
    return facts if math.isfinite(facts["loss"]) else {"failure": f"the loss is {facts['loss']}"}


def begin(device, runs, out):
    """Return the report with the head of its table; the first row to work knows the device."""
    report = Report(
        "Training EfficientVMamba-T on a GPU",
        out,
        machine=device,
        versions=machine.versions("jax", "jaxlib", "flax", "torch", "timm", "mamba-ssm"),
        date=machine.today(),
    )
    report.text(
        f"{SIDE} px, bfloat16, whole optimizer steps, images on the GPU already. {runs} steps after {WARM_UP}, in "
        f"groups of {GROUP}: median, fastest and slowest group. Ratio: images/s over the first row's of the batch. "
        "Written by `benchmarks/gpu_train.py`."
    )
    report.table(
        ("batch", "{}"),
        "what",
        "scans",
        ("step, ms", "{:.2f}"),
        ("fastest to slowest", "{:.2f} to {:.2f}"),
        ("images/s", "{:,.0f}"),
        ("peak memory, GiB", "{:.2f}"),
        ("ratio", "{:.2f}"),
    )
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, help="a clone of TerryPei/EfficientVMamba")
    parser.add_argument("--compile", action="store_true", help="also the official model through torch.compile")
    parser.add_argument("--scans", nargs="+", default=["auto"], choices=("auto", "pallas", "sequential", "associative"))
    parser.add_argument("--batch", nargs="+", type=int, default=[128], help="images a step (default 128)")
    parser.add_argument("--runs", type=int, default=20, help="timed steps, in groups of five (default 20)")
    parser.add_argument("--limit", type=float, default=600, help="seconds a row may take (default 600)")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, *row = json.loads(options.one)
        print(json.dumps({"ours": ours, "official": official}[side](*row)))
        return
    peers = []
    if options.official:
        if not (options.official / MODULE).is_file():
            sys.exit(f"error: there is no {options.official / MODULE}; give a clone of TerryPei/EfficientVMamba")
        needed = ("torch", "timm", "einops")
        scans = ("selective_scan_cuda_core", "selective_scan_cuda")
        if all(map(importlib.util.find_spec, needed)) and any(map(importlib.util.find_spec, scans)):
            peers = ["eager", "torch.compile"] if options.compile else ["eager"]
        else:
            print(f"the official code is left out: it needs {', '.join(needed)} and {' or '.join(scans)}")
    kinds = [("official", str(options.official.resolve()), how) for how in peers]
    kinds += [("ours", scans) for scans in options.scans]
    report, failed = None, False
    for batch in options.batch:
        base = math.nan
        for kind in kinds:
            facts = in_process(options.limit, *kind, batch, options.runs)
            name = f"{kind[0]}, {kind[-1]}"
            report = report or begin(facts.get("device"), options.runs, options.out)
            if "failure" in facts:
                report.row(batch, name, facts["failure"])
                failed = True
                continue
            times = [1e3 * seconds for seconds in facts["times"]]
            median = statistics.median(times)
            base = median if kind == kinds[0] else base
            rate, peak = batch / median * 1e3, facts["peak"] / 2**30
            spread = [min(times), max(times)]
            report.row(batch, name, facts["scans"] or kind[-1], median, spread, rate, peak, base / median)
            print(f"{name}: {facts['parameters']:,} parameters, loss {facts['loss']:.3f}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
