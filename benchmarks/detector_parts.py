"""Memory and time of a detector's parts in a train step on a TPU chip, by the TPU compiler: nothing runs.

Each part is compiled by itself for one chip, with its gradients, at the official sizes: images of 800x1344 pixels with
100 objects. A part's memory is what the compiler sets aside beside arguments and results; in the whole step parts
follow each other, and XLA shares much of it. Times are the preflight's, without all trips but one of loops whose length
depends on data.

    python benchmarks/detector_parts.py [--chips v5e:2 v6e:4] [--configs NAME ...] [--fast] [--out FILE]

``v5e:2`` is a generation and its images a chip. ``--fast`` compiles at JAX's optimisation level O1.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report

ROOT = Path(__file__).parents[1]
CONFIGS = ["mask_rcnn_vmamba_t", "cascade_mask_rcnn_mambavision_t"]
MEBIBYTE = 2**20
ALONE = "RoIAlign 7x7 of 1000"  # as a test has it
PARTS = (
    *("backbone", "neck, RPN head", "proposals", "losses of proposals", "RoIAlign 7x7", "RoIAlign 14x14", "box head"),
    *("mask head, loss", ALONE),
)


def compile_part(config: str, part: str, generation: str, images: int) -> None:
    """Compile a part in this process, and print its facts as a line of JSON."""
    from evmamba_jax.preflight import aot, hlo
    from evmamba_jax.preflight.clock import clock

    function, arguments = parts_of(config, images)[part]()
    with tempfile.TemporaryDirectory() as dump_folder:
        aot.prepare(dump_folder)
        compiled = aot.compile_for(generation, function, *arguments)
        memory, program = compiled.memory_analysis(), hlo.parse(compiled.as_text())
        items = clock(program, dump_folder, generation)
    found, unknown = hlo.runs(program)
    facts = {
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "milliseconds": sum(item.seconds for item in items) * 1e3,
        "kernels": sum(times for *_, times in hlo.pallas_calls(found)),
        "unknown": len(unknown),
    }
    print(json.dumps(facts))


def parts_of(name: str, images: int) -> dict[str, Callable[[], tuple[Callable[..., Any], tuple]]]:
    """Return what gives the function of each part, and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from evmamba_jax.arrays import merge, split
    from evmamba_jax.detection import Objects
    from evmamba_jax.detection import proposals as rpn
    from evmamba_jax.detection.masks import PackedMasks
    from evmamba_jax.detection.rcnn import BOX_SIZE, MASK_SIZE, STRIDES
    from evmamba_jax.detection.regions import extract
    from evmamba_jax.detection.sampling import Regions
    from evmamba_jax.tasks import task_of

    config = importlib.import_module(f"configs.detection.{name}").get_config()
    config.model.remat = "block"
    kind = task_of(config)
    task = kind(config, kind.describe(config).class_names)
    model = nnx.eval_shape(task.build_model)
    model.train()
    graphdef, *arrays = split(model)
    settings, fixed = model.settings, jax.lax.stop_gradient
    of = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    batch = {n: of((images, *array.shape), array.dtype) for n, array in task.reader().blank(training=True).items()}
    image, sizes, key = of(batch["image"].shape), of((images, 2), jnp.int32), of((2,), jnp.uint32)
    objects = Objects(batch["boxes"], batch["labels"], batch["valid"], PackedMasks(batch["masks"]))
    count, positives = settings.regions.count, settings.regions.positives
    boxes, labels = of((images, count, 4)), of((images, count), jnp.int32)

    def trained(function: Callable[..., Any], given: Any, *rest: Any) -> tuple[Callable[..., Any], tuple]:
        """Return a function of the model and others, with its gradients by parameters and by ``given``."""

        def results(params: Any, stats: Any, given: Any, *rest: Any) -> Any:
            return function(merge(graphdef, params, stats), given, *rest)

        def both(back: Any, params: Any, stats: Any, given: Any, *rest: Any) -> tuple:
            out, pull = jax.vjp(lambda params, given: results(params, stats, given, *rest), params, given)
            return out, pull(back)

        shapes = (*arrays, given, *rest)
        return both, (jax.eval_shape(results, *shapes), *shapes)

    def shapes_of(function: Callable[..., Any], *inputs: Any) -> Any:
        return jax.eval_shape(lambda *all: function(merge(graphdef, *all[:2]), *all[2:]), *arrays, *inputs)

    def features(model: Any, image: jax.Array, key: jax.Array) -> Any:
        return model.backbone.features(fixed(image), key=jax.random.wrap_key_data(key))

    def losses_of_proposals(model: Any, raw: Any, objects: Any, sizes: jax.Array, key: jax.Array) -> Any:
        wanted = rpn.targets(raw, objects, sizes, sizes, model.anchors, model.rules)
        chosen = settings.anchors(wanted.positive, wanted.negative, jax.random.wrap_key_data(key))
        return rpn.losses(raw, wanted.only(*chosen, None), model.rules)

    def held(model: Any, levels: Any, boxes: jax.Array, size: int) -> jax.Array:
        of_image = lambda levels, boxes: extract(levels, boxes, STRIDES[:-1], size)  # noqa: E731
        return jax.vmap(of_image)(levels[:-1], fixed(boxes))

    def box_head(model: Any, held: jax.Array, valid: jax.Array) -> Any:
        return model.box_heads[0](held, valid)

    def mask_loss(model: Any, levels: Any, boxes: jax.Array, labels: jax.Array, masks: Any, sizes: jax.Array) -> Any:
        there = jnp.ones(labels.shape, bool)
        regions = Regions(fixed(boxes), labels, labels, there, there, there)
        return model._mask_loss(0, levels, regions, masks, sizes)[0]

    maps = shapes_of(features, image, key)
    levels, raw = shapes_of(lambda model, maps: model.outputs(maps), maps)
    of_regions = of((images * count, BOX_SIZE, BOX_SIZE, levels[0].shape[-1]), levels[0].dtype)
    one = [of((1, *level.shape[1:]), level.dtype) for level in levels]
    return {
        "backbone": lambda: trained(features, image, key),
        "neck, RPN head": lambda: trained(lambda model, maps: model.outputs(maps), maps),
        "proposals": lambda: (
            lambda raw, sizes: rpn.proposals(raw, sizes, model.anchors, settings.trained, model.rules.coder),
            (raw, sizes),
        ),
        "losses of proposals": lambda: trained(losses_of_proposals, raw, objects, sizes, key),
        "RoIAlign 7x7": lambda: trained(functools.partial(held, size=BOX_SIZE), levels, boxes),
        "RoIAlign 14x14": lambda: trained(functools.partial(held, size=MASK_SIZE), levels, of((images, positives, 4))),
        "box head": lambda: trained(box_head, of_regions, of((images * count,), bool)),
        "mask head, loss": lambda: trained(mask_loss, levels, boxes, labels, objects.masks, sizes),
        ALONE: lambda: (functools.partial(held, None, size=BOX_SIZE), (one, of((1, 1000, 4)))),
    }


def run(config: str, part: str, chip: str, *, fast: bool) -> dict[str, Any]:
    """Compile a part in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"JAX_OPTIMIZATION_LEVEL": "O1"} if fast else {})
    command = [sys.executable, __file__, "--one", config, part, *chip.split(":")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refusal": done.stderr.splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5e:2", "v6e:4"], metavar="GENERATION:IMAGES")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="NAME")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        *names, images = options.one
        compile_part(*names, int(images))
        return
    versions = machine.versions("jax", "jaxlib", "libtpu")
    title = "Parts of detectors on TPUs: the compiler's figures, nothing ran on a TPU"
    report = Report(title, options.out, versions=versions, date=machine.today())
    report.text(
        "Each part of a train step compiled by itself for one chip, with its gradients, images of 800x1344 pixels with "
        f"100 objects; `{ALONE}`: without gradients, one image of a test. Temporaries: what the compiler sets aside "
        "beside arguments and results, at its peak. Milliseconds: by the preflight's clock, kernels included, with a "
        "single trip of each loop whose length depends on data. Of a cascade, box head and masks are one round's. "
        "Written by "
        f"`benchmarks/detector_parts.py{' --fast' if options.fast else ''}`."
    )
    sizes = [("temporaries, MiB", "{:,.1f}"), ("results, MiB", "{:,.1f}"), ("ms", "{:.2f}"), ("kernels", "{}")]
    report.table("config", "chip", "images", "part", *sizes, ("such loops", "{}"))
    for config in options.configs:
        for chip in options.chips:
            for part in options.parts:
                facts = run(config, part, chip, fast=options.fast)
                if "refusal" in facts:
                    report.row(config, *chip.split(":"), part, facts["refusal"])
                    continue
                memory = [facts[name] / MEBIBYTE for name in ("temporaries", "results")]
                counts = [facts[name] for name in ("milliseconds", "kernels", "unknown")]
                report.row(config, *chip.split(":"), part, *memory, *counts)


if __name__ == "__main__":
    main()
