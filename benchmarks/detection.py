"""Time of Mask R-CNN on a CPU behind its backbone, ours beside torchvision's: training, inference, and their parts.

Both have the same maps, weights, objects and numbers of boxes. Each works in a process and an environment of its own,
on two threads. The two take turns, so that whatever else the machine does meets both alike. Ratios are medians over the
rounds, each between neighbours in time. Which anchors and regions losses are taken of is drawn by each for itself.

    python benchmarks/detection.py --torch PYTHON [--rounds 7] [--only CASE ...] [--out FILE]

PYTHON is the interpreter of an environment with torch and torchvision.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from evmamba_jax.measuring.servers import Server, answer

THREADS, BATCH, SIDE = 2, 2, 320
STRIDES = (4, 8, 16, 32)
WIDTHS = (96, 192, 384, 768)  # of the maps: VMamba-T's
WIDTH, CLASSES = 256, 80
# Of an image. There are so many objects that as many regions are positive as may be.
OBJECTS, DETECTIONS = 24, 100
# Deviation of the class logits' kernel, initially 0.01: some thousand pairs of a box and a class are then above 0.05.
CLASS_STD = 0.2
BOXES, OVERLAP = 1000, 0.7

# (what, timed calls of a turn)
CASES = {
    "training: FPN to losses, with gradients": 1,
    "inference: FPN to pasted masks": 1,
    "RoIAlign of 1000 boxes, 7x7": 3,
    "RoIAlign of 1000 boxes, 7x7, with gradients": 3,
    "RoIAlign of 100 boxes, 14x14": 5,
    "NMS of 1000 boxes": 10,
    "NMS of 4000 boxes, 1000 kept": 10,
}
TRAINING, INFERENCE = list(CASES)[:2]
ALIGNED = {"1000 boxes, 7x7": (1000, 7), "100 boxes, 14x14": (100, 14)}


def make_files(folder: Path) -> None:
    """Write what both sides have."""
    import numpy as np

    rng = np.random.default_rng(0)

    def boxes(*shape: int, low: float, high: float):
        """Return boxes with sides from ``low`` to ``high``, as many small ones as large ones."""
        sides = np.exp(rng.uniform(np.log(low), np.log(high), (*shape, 2)))
        corners = rng.uniform(0, 1, (*shape, 2)) * (SIDE - sides)
        return np.concatenate([corners, corners + sides], -1).astype(np.float32)

    arrays = {}
    for stride, width in zip(STRIDES, WIDTHS, strict=True):
        arrays[f"map{stride}"] = rng.normal(size=(BATCH, SIDE // stride, SIDE // stride, width)).astype(np.float32)
        arrays[f"level{stride}"] = rng.normal(size=(SIDE // stride, SIDE // stride, WIDTH)).astype(np.float32)
    arrays["objects"] = objects = boxes(BATCH, OBJECTS, low=40, high=200)
    arrays["labels"] = rng.integers(0, CLASSES, (BATCH, OBJECTS))
    # An object fills the ellipse in its box.
    x0, y0, x1, y1 = np.moveaxis(objects, -1, 0)[..., None, None]
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    across, down = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
    arrays["masks"] = across**2 + down**2 < 1
    arrays["regions"] = boxes(1000, low=8, high=SIDE - 8)
    # Many a box is near another one, as proposals are.
    centres = np.repeat(boxes(800, low=16, high=200), 5, 0)
    arrays["proposals"] = rng.permutation(centres + rng.normal(0, 4, centres.shape).astype(np.float32))
    arrays["scores"] = rng.permutation(len(centres)).astype(np.float32) / len(centres)
    np.savez(folder / "inputs.npz", **arrays)


# --- The two sides ----------------------------------------------------------------------------------------------------
# Each is a class. ``case(what)`` returns a function without arguments that returns when its work is done; it returns
# numbers that say what it did.


class Side:
    """What both sides share: a case by its name."""

    def case(self, what: str):
        if what == TRAINING:
            return self.training()
        if what == INFERENCE:
            return self.inference()
        return self.nms(what) if what.startswith("NMS") else self.roi_align(what)


class Ours(Side):
    """This package."""

    packages = "jax", "jaxlib", "flax", "numpy"

    def __init__(self, folder: Path):
        import jax.numpy as jnp
        import numpy as np
        from flax import nnx

        from evmamba_jax.arrays import merge, split
        from evmamba_jax.detection.mask_rcnn import MaskRCNN, head_rows
        from evmamba_jax.detection.matching import Objects
        from evmamba_jax.weights.convert import fill_rows

        class FromMaps(MaskRCNN):
            """Takes the backbone's maps for images."""

            def __call__(self, images, *, key=None):
                del key
                return self.outputs(images)

        with np.load(folder / "inputs.npz") as inputs:
            self.inputs = {name: jnp.asarray(array) for name, array in inputs.items()}
        model = FromMaps(None, WIDTHS, None, CLASSES, rngs=nnx.Rngs(0))
        with np.load(folder / "weights.npz") as weights:
            fill_rows(model, head_rows(model), dict(weights))
        graphdef, self.params, stats = split(model)
        self.merge = lambda params: merge(graphdef, params, stats)
        self.maps = [self.inputs[f"map{stride}"] for stride in STRIDES]
        self.sizes = jnp.full((BATCH, 2), SIDE)
        there = jnp.ones((BATCH, OBJECTS), bool)
        self.objects = Objects(self.inputs["objects"], self.inputs["labels"], there, self.inputs["masks"])
        self.compiled = {}

    def compile(self, what: str, function, *arguments):
        """Return a function compiled for its arguments; what that took is kept."""
        import jax

        began = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        memory = program.memory_analysis()
        self.compiled[what] = {
            "seconds": time.perf_counter() - began,
            "temporaries": memory.temp_size_in_bytes / 2**20,
            "arguments": memory.argument_size_in_bytes / 2**20,
            "outputs": memory.output_size_in_bytes / 2**20,
        }
        return lambda: jax.block_until_ready(program(*arguments))

    def training(self):
        import jax

        from evmamba_jax.detection.rcnn import Losses

        def loss(params, maps, objects, key):
            model = self.merge(params)
            model.train()
            losses: Losses = model.loss(maps, objects, self.sizes, self.sizes, key=key)
            return losses.total, losses

        step = jax.value_and_grad(loss, (0, 1), has_aux=True)
        run = self.compile(TRAINING, step, self.params, self.maps, self.objects, jax.random.key(0))

        def case():
            losses = run()[0][1]
            return {name: float(loss.sum()) for name, loss in losses._asdict().items()}

        return case

    def inference(self):
        import numpy as np

        from evmamba_jax.detection.masks import paste

        def detect(params, maps):
            model = self.merge(params)
            model.eval()
            return model.detect(maps, self.sizes, limit=DETECTIONS)

        run = self.compile(INFERENCE, detect, self.params, self.maps)

        def case():
            found = run()
            masks, boxes = np.asarray(found.masks), np.asarray(found.boxes)
            counts = np.asarray(found.count)
            pasted = [paste(masks[i, :n], boxes[i, :n], SIDE, SIDE) for i, n in enumerate(counts)]
            return {"detections": sum(map(len, pasted)), "mean score": float(found.scores.sum() / counts.sum())}

        return case

    def roi_align(self, what: str):
        import jax

        from evmamba_jax.detection.regions import extract

        count, size = aligned(what)

        def held(levels, boxes):
            return extract([level[None] for level in levels], boxes[None], STRIDES, size)[0]

        def with_gradients(levels, boxes, of_held):
            out, pull = jax.vjp(lambda levels: held(levels, boxes), levels)
            return out, pull(of_held)

        levels, boxes = [self.inputs[f"level{stride}"] for stride in STRIDES], self.inputs["regions"][:count]
        if what.endswith("gradients"):
            run = self.compile(what, with_gradients, levels, boxes, jax.numpy.ones((count, size, size, WIDTH)))
            return lambda: {"mean square": float((run()[0] ** 2).mean())}
        run = self.compile(what, held, levels, boxes)
        return lambda: {"mean square": float((run() ** 2).mean())}

    def nms(self, what: str):
        from evmamba_jax.detection.nms import nms

        boxes, scores = (self.inputs[name][: suppressed(what)] for name in ("proposals", "scores"))
        run = self.compile(what, functools.partial(nms, threshold=OVERLAP, limit=BOXES), boxes, scores)
        return lambda: {"kept": int(run().count)}


class Theirs(Side):
    """torchvision."""

    packages = "torch", "torchvision"

    def __init__(self, folder: Path):
        import numpy as np
        import torch
        from torchvision.models.detection import MaskRCNN
        from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        class Backbone(torch.nn.Module):
            """A pyramid on given maps."""

            out_channels = WIDTH

            def __init__(self):
                super().__init__()
                self.fpn = FeaturePyramidNetwork(list(WIDTHS), WIDTH, LastLevelMaxPool())

            def forward(self, maps):
                return self.fpn(maps)

        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        # With a sampling ratio of 0, torchvision samples each cell of a bin once, as we do.
        self.pool = functools.partial(MultiScaleRoIAlign, [str(i) for i in range(len(STRIDES))], sampling_ratio=0)
        model = MaskRCNN(
            Backbone(),
            CLASSES + 1,
            rpn_post_nms_top_n_train=1000,
            box_detections_per_img=DETECTIONS,
            box_roi_pool=self.pool(output_size=7),
            mask_roi_pool=self.pool(output_size=14),
        )
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=CLASS_STD)
        self.model = model
        np.savez(folder / "weights.npz", **self.weights())
        with np.load(folder / "inputs.npz") as inputs:
            self.inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
        # Maps with the channels first.
        self.maps = {
            str(i): self.inputs[f"map{stride}"].permute(0, 3, 1, 2).contiguous() for i, stride in enumerate(STRIDES)
        }
        self.targets = [
            {"boxes": boxes, "labels": labels + 1, "masks": masks.byte()}
            for boxes, labels, masks in zip(
                *(self.inputs[name] for name in ("objects", "labels", "masks")), strict=True
            )
        ]

    def weights(self) -> dict:
        """Return the weights by mmdet's names, in which the background is the last class."""
        import numpy as np

        places = {
            "backbone.fpn.inner_blocks.{}.0": "neck.lateral_convs.{}.conv",
            "backbone.fpn.layer_blocks.{}.0": "neck.fpn_convs.{}.conv",
            "roi_heads.mask_head.{}.0": "roi_head.mask_head.convs.{}.conv",
        }
        names = {old.format(i): new.format(i) for old, new in places.items() for i in range(4)} | {
            "rpn.head.conv.0.0": "rpn_head.rpn_conv",
            "rpn.head.cls_logits": "rpn_head.rpn_cls",
            "rpn.head.bbox_pred": "rpn_head.rpn_reg",
            "roi_heads.box_head.fc6": "roi_head.bbox_head.shared_fcs.0",
            "roi_heads.box_head.fc7": "roi_head.bbox_head.shared_fcs.1",
            "roi_heads.box_predictor.cls_score": "roi_head.bbox_head.fc_cls",
            "roi_heads.box_predictor.bbox_pred": "roi_head.bbox_head.fc_reg",
            "roi_heads.mask_predictor.conv5_mask": "roi_head.mask_head.upsample",
            "roi_heads.mask_predictor.mask_fcn_logits": "roi_head.mask_head.conv_logits",
        }
        first = {"fc_cls": lambda x: np.roll(x, -1, 0), "fc_reg": lambda x: x[4:], "conv_logits": lambda x: x[1:]}
        state = {}
        for path, array in self.model.state_dict().items():
            layer, _, kind = path.rpartition(".")
            name = names[layer]
            state[f"{name}.{kind}"] = first.get(name.rpartition(".")[2], lambda x: x)(array.numpy())
        return state

    def found(self, maps, targets=None):
        """Return detections and losses, as the model's ``forward`` does behind its backbone's maps."""
        import torch
        from torchvision.models.detection.image_list import ImageList

        sizes = [(SIDE, SIDE)] * BATCH
        images = ImageList(torch.empty(BATCH, 3, SIDE, SIDE), sizes)  # only their shape counts
        levels = self.model.backbone(maps)
        proposals, of_proposals = self.model.rpn(images, levels, targets)
        found, of_regions = self.model.roi_heads(levels, proposals, sizes, targets)
        return self.model.transform.postprocess(found, sizes, sizes), of_proposals | of_regions

    def training(self):
        maps = {name: array.clone().requires_grad_() for name, array in self.maps.items()}

        def case():
            self.model.train()
            for array in (*self.model.parameters(), *maps.values()):
                array.grad = None
            _, losses = self.found(maps, self.targets)
            sum(losses.values()).backward()
            return {name: float(loss) for name, loss in losses.items()}

        return case

    def inference(self):
        import torch

        def case():
            self.model.eval()
            with torch.inference_mode():
                found, _ = self.found(self.maps)
            scores = torch.cat([each["scores"] for each in found])
            return {"detections": sum(len(each["masks"]) for each in found), "mean score": float(scores.mean())}

        return case

    def roi_align(self, what: str):
        import torch

        count, size = aligned(what)
        gradients = what.endswith("gradients")
        levels = {
            str(i): self.inputs[f"level{stride}"].permute(2, 0, 1)[None].contiguous().requires_grad_(gradients)
            for i, stride in enumerate(STRIDES)
        }
        pool, boxes = self.pool(output_size=size), [self.inputs["regions"][:count]]
        of_held = torch.ones(count, WIDTH, size, size)

        def case():
            held = pool(levels, boxes, [(SIDE, SIDE)])
            if gradients:
                torch.autograd.grad(held, list(levels.values()), of_held)
            return {"mean square": float((held**2).mean())}

        return case

    def nms(self, what: str):
        from torchvision.ops import nms

        boxes, scores = (self.inputs[name][: suppressed(what)] for name in ("proposals", "scores"))
        return lambda: {"kept": len(nms(boxes, scores, OVERLAP)[:BOXES])}


def aligned(what: str) -> tuple[int, int]:
    """Return the boxes and the bins of a case of RoIAlign."""
    return next(sizes for name, sizes in ALIGNED.items() if name in what)


def suppressed(what: str) -> int:
    """Return the boxes of a case of NMS."""
    return int(what.split()[2])


# --- Measuring --------------------------------------------------------------------------------------------------------


def serve(side: str, folder: Path) -> None:
    """Answer requests on THREADS cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    mine = {"ours": Ours, "theirs": Theirs}[side](folder)
    cases = {}

    def reply(request: dict) -> dict:
        what = request["what"]
        if what == "versions":
            return {"versions": {name: version(name) for name in mine.packages}}
        if what == "compiled":
            return mine.compiled
        if what not in cases:
            cases[what] = mine.case(what)
            return cases[what]()
        times = []
        for _ in range(CASES[what]):
            began = time.perf_counter()
            cases[what]()
            times.append(time.perf_counter() - began)
        return {"ms": 1e3 * statistics.median(times)}

    answer(reply)


def measure(python: str, folder: Path, rounds: int, only: list[str], out: Path | None) -> None:
    """Fill the report."""
    from evmamba_jax.measuring import machine
    from evmamba_jax.measuring.document import Report

    make_files(folder)
    known = {"machine": machine.cpu(), "versions": machine.versions("Python"), "date": machine.today()}
    report = Report("Mask R-CNN behind its backbone on a CPU", out, **known)
    report.text(
        f"Four maps of {SIDE} x {SIDE} images, of {', '.join(map(str, WIDTHS))} channels, batch {BATCH}, float32, "
        f"{THREADS} threads. Widths, weights and numbers are the same on both sides: {WIDTH} channels, {CLASSES} "
        f"classes; in training 2000 proposals of a level, 1000 of an image, {OBJECTS} objects, losses of 256 anchors "
        f"and 512 regions, 128 of them positive; in inference 1000 proposals, {DETECTIONS} detections. Gradients are "
        f"taken of all weights and of the maps. NMS has a threshold of {OVERLAP}. RoIAlign takes a sample "
        f"for each cell of a bin. Wall time: median of {rounds} rounds, in which the two take turns. Ratio: ours over "
        "theirs, median of the rounds. Written by `benchmarks/detection.py`."
    )
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}
    variables |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    servers = {}
    for side, name in {"theirs": python, "ours": sys.executable}.items():  # theirs writes the weights
        servers[side] = Server([name, __file__, "--serve", side, str(folder)], variables)
        told = servers[side].ask(what="versions")["versions"]
        report.text(f"- {side}: {', '.join(map(' '.join, told.items()))}")
    report.table("case", "side", "what it gave")
    for what in only:
        for side, server in servers.items():
            gave = server.ask(what=what)
            report.row(what, side, ", ".join(f"{name} {number:.5g}" for name, number in gave.items()))
    times = {what: {side: [] for side in servers} for what in only}
    for _ in range(rounds):
        for what in only:
            for side, server in servers.items():
                times[what][side].append(server.ask(what=what)["ms"])
    report.table("case", ("ours, ms", "{:.1f}"), ("theirs, ms", "{:.1f}"), ("ratio", "{:.2f}"))
    for what, both in times.items():
        ratio = statistics.median(a / b for a, b in zip(both["ours"], both["theirs"], strict=True))
        report.row(what, *(statistics.median(both[side]) for side in ("ours", "theirs")), ratio)
    report.text("What our programs cost: seconds to trace, lower and compile, and MiB as the compiler reports them.")
    numbers = ("temporaries", "arguments", "outputs")
    report.table("case", ("compile, s", "{:.1f}"), *((f"{name}, MiB", "{:.1f}") for name in numbers))
    for what, cost in servers["ours"].ask(what="compiled").items():
        report.row(what, cost["seconds"], *(cost[name] for name in numbers))
    for server in servers.values():
        server.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="interpreter of an environment with torch and torchvision")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each case (default 7)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]))
    if not options.torch:
        parser.error("--torch is needed")
    with tempfile.TemporaryDirectory() as folder:
        measure(options.torch, Path(folder), options.rounds, options.only, options.out)


if __name__ == "__main__":
    main()
