"""Parameters and multiply-adds of every config of a segmenter or detector, beside what is published.

Nothing is allocated or compiled: both are counted in shapes and in the traced program. Images are 512x2048 for
segmentation (640x2560 at 640 px; of Vim, which takes windows, 512x512) and 1280x800 for detection, as in the papers
(of Vim, which takes squares, 1024x1024). As mmdet counts detectors with regions, their box heads see 1000 and their
mask heads 100; what cuts regions out of maps is not counted. Files ``_3x`` have the models of those without.

    python benchmarks/dense_sizes.py [--only NAME ...] [--out FILE]
"""

import argparse
import importlib
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax.numpy as jnp
from flax import nnx

from evmamba_jax.analysis import count_flops, count_parameters
from evmamba_jax.detection.rcnn import BOX_SIZE, MASK_SIZE, RCNN
from evmamba_jax.measuring import machine
from evmamba_jax.measuring.document import Report
from evmamba_jax.tasks import task_of

CONFIGS = Path(__file__).parents[1] / "configs"
# Millions of parameters and thousands of millions of multiply-adds, as printed; None where nothing is.
PUBLISHED = {
    "segmentation/upernet_evmamba_t": (14, 230),
    "segmentation/upernet_evmamba_s": (29, 505),
    "segmentation/upernet_evmamba_b": (65, 930),
    "segmentation/upernet_vmamba_t": (62, 949),
    "segmentation/upernet_vmamba_t_s2l5": (62, 948),
    "segmentation/upernet_vmamba_s": (82, 1028),
    "segmentation/upernet_vmamba_b": (122, 1170),
    "segmentation/upernet_vmamba_t_v0": (55, 964),
    "segmentation/upernet_vmamba_s_v0": (76, 1081),
    "segmentation/upernet_vmamba_b_v0": (110, 1226),
    "segmentation/upernet_msvmamba_m": (42, 875),
    "segmentation/upernet_msvmamba_t": (65, 942),
    "segmentation/upernet_mambavision_t": (55, 945),
    "segmentation/upernet_mambavision_s": (84, 1135),
    "segmentation/upernet_mambavision_b": (126, 1342),
    "segmentation/upernet_mambavision_l3_640": (780, 3670),
    "segmentation/upernet_vim_t": (13, None),
    "segmentation/upernet_vim_s": (46, None),
    "detection/retinanet_evmamba_t": (13.0, None),
    "detection/retinanet_evmamba_s": (19.0, None),
    "detection/retinanet_evmamba_b": (44.0, None),
    "detection/mask_rcnn_evmamba_t": (11, 60),
    "detection/mask_rcnn_evmamba_s": (31, 197),
    "detection/mask_rcnn_evmamba_b": (53, 252),
    "detection/mask_rcnn_vmamba_t": (50, 271),
    "detection/mask_rcnn_vmamba_t_s2l5": (None, 270),
    "detection/mask_rcnn_vmamba_s": (70, 349),
    "detection/mask_rcnn_vmamba_b": (108, 485),
    "detection/mask_rcnn_vmamba_t_v0": (42, 286),
    "detection/mask_rcnn_vmamba_s_v0": (64, 400),
    "detection/mask_rcnn_vmamba_b_v0": (96, 540),
    "detection/mask_rcnn_msvmamba_m": (32, 201),
    "detection/mask_rcnn_msvmamba_t": (53, 252),
    "detection/cascade_mask_rcnn_mambavision_t": (86, 740),
    "detection/cascade_mask_rcnn_mambavision_s": (108, 828),
    "detection/cascade_mask_rcnn_mambavision_b": (145, 964),
}


class OfRegions(nnx.Module):
    """The heads of a detector's regions, whose numbers do not matter here.

    Args:
        model: the detector.
        width: channels of its levels.
    """

    def __init__(self, model: RCNN, width: int):
        self.box_heads, self.mask_heads, self.width = model.box_heads, model.mask_heads, width
        self.in_channels = 3  # of the image

    def __call__(self, images):
        """Return what the heads say of 1000 and of 100 regions."""
        regions = [
            jnp.broadcast_to(images[0, 0, 0, 0], (count, size, size, self.width))
            for count, size in ((1000, BOX_SIZE), (100, MASK_SIZE))
        ]
        boxes = [head(regions[0], jnp.ones(1000, bool)) for head in self.box_heads]
        return boxes, [head(regions[1]) for head in self.mask_heads]


def measure(name: str) -> tuple[int, int]:
    """Return parameters and multiply-adds of a config's model."""
    config = importlib.import_module(f"configs.{name.replace('/', '.')}").get_config()
    kind = task_of(config)
    task = kind(config, kind.describe(config).class_names)
    model = nnx.eval_shape(task.build_model)
    if config.task == "detection":
        size = (1280, 800) if config.data.augment != "large_scale_jitter" else config.data.scale
    else:
        side = config.data.image_size
        size = (side, side if config.data.test == "slide" else 4 * side)
    flops = count_flops(model, size)
    if isinstance(model, RCNN):
        flops += count_flops(OfRegions(model, config.detector.width), size)
    return count_parameters(model), flops


def ratio(ours: float, published: float | None) -> float | None:
    return None if published is None else 100 * (ours / published - 1)


def main():
    names = sorted(
        path.relative_to(CONFIGS).with_suffix("").as_posix()
        for folder in ("segmentation", "detection")
        for path in (CONFIGS / folder).glob("*.py")
        if not path.stem.endswith("_3x")
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file, and Markdown beside it")
    options = parser.parse_args()
    report = Report(
        "Sizes of segmenters and detectors",
        options.out,
        versions=machine.versions("Python", "jax", "flax"),
        date=machine.today(),
    )
    report.text(
        "Counted in shapes and in the traced program (`evmamba_jax.analysis`), not measured. Multiply-adds, each once, "
        "of one image: 512x2048 for segmentation (640x2560 at 640 px; of Vim, which takes windows, 512x512), 1280x800 "
        "for detection (of Vim 1024x1024), where box heads see 1000 regions and mask heads 100. Per cent: ours over "
        "the published figure, which is rounded."
    )
    report.table(
        "config",
        ("parameters", "{:,d}"),
        "published",
        ("%", "{:+.1f}"),
        ("G multiply-adds", "{:.1f}"),
        "published",
        ("%", "{:+.1f}"),
    )
    for name in options.only:
        parameters, flops = measure(name)
        published, published_flops = PUBLISHED.get(name, (None, None))
        report.row(
            name,
            parameters,
            f"{published}M" if published else None,
            ratio(parameters / 1e6, published),
            flops / 1e9,
            f"{published_flops}G" if published_flops else None,
            ratio(flops / 1e9, published_flops),
        )


if __name__ == "__main__":
    main()
