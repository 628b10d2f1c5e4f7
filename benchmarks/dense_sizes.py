"""Parameters and multiply-adds of every config of a segmenter or detector, beside what is published.

Nothing is allocated or compiled: both are counted in shapes and in the traced program. Images are 512x2048 for
segmentation (640x2560 at 640 px; of Vim, which takes windows, 512x512) and 1280x800 for detection, as in the papers.

    python benchmarks/dense_sizes.py [--only NAME ...] [--out FILE]
"""

import argparse
import importlib
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from flax import nnx
from lib import machine
from lib.report import Report

from evmamba_jax.analysis import count_flops, count_parameters
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
}


def measure(name: str) -> tuple[int, int]:
    """Return parameters and multiply-adds of a config's model."""
    config = importlib.import_module(f"configs.{name.replace('/', '.')}").get_config()
    kind = task_of(config)
    task = kind(config, kind.describe(config).class_names)
    model = nnx.eval_shape(task.build_model)
    if config.task == "detection":
        size = (1280, 800)
    else:
        side = config.data.image_size
        size = (side, side if config.data.test == "slide" else 4 * side)
    return count_parameters(model), count_flops(model, size)


def ratio(ours: float, published: float | None) -> float | None:
    return None if published is None else 100 * (ours / published - 1)


def main():
    names = sorted(
        path.relative_to(CONFIGS).with_suffix("").as_posix()
        for folder in ("segmentation", "detection")
        for path in (CONFIGS / folder).glob("*.py")
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
        "for detection. Per cent: ours over the published figure, which is rounded."
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
