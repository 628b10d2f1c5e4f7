"""Record what timm and EfficientVMamba's own code make of small images, operation by operation, in augment.npz.

Not run by the tests. In an environment of its own, with `pip install timm torchvision numpy "pillow<13"` (Pillow 13
refuses to keep 0 bits, on which timm 1.0.31 stops) and a clone of https://github.com/TerryPei/EfficientVMamba:

    python tests/golden/training/make_augment.py EfficientVMamba/classification/lib/dataset/augment_ops.py

`names` and `pixels` belong together, entry by entry. A name is SET/OPERATION/MAGNITUDE/SIGN/INTERPOLATION, where
SET is `timm` or `evmamba`; or `eval/CROP_MODE/CROP_PCT/INTERPOLATION`. Operations were run on `image`, evaluation on
`wide`. `versions` says by what.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import PIL
import timm
import torchvision
from PIL import Image
from timm.data import auto_augment, create_transform

FILL = (124, 116, 104)
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
OWN = ("Distort", "Zoom", "Blur", "Skew")


def picture(height: int, width: int) -> np.ndarray:
    """Slopes, edges and texture, a channel each, none of them from 0 to 255."""
    y, x = np.mgrid[:height, :width]
    return np.stack([40 + 7 * x, 30 + 5 * y + x * y % 31, 60 + (x * x + 3 * y * y) % 97], axis=-1).astype(np.uint8)


def run(module, operation, name: str, magnitudes, interpolation: str):
    """Yield an operation's results at some magnitudes, with both signs where it asks for one."""
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling[interpolation.upper()]}
    for magnitude in magnitudes:
        for sign in (1, -1):
            asked = []
            module._randomly_negate = lambda v, sign=sign, asked=asked: asked.append(v) or sign * v
            result = operation(name, prob=1.0, magnitude=magnitude, hparams=hparams)(Image.fromarray(IMAGE))
            if sign == 1 or asked:
                yield f"{name}/{magnitude}/{'+' if sign == 1 else '-'}/{interpolation}", np.asarray(result)


IMAGE, WIDE = picture(24, 24), picture(31, 40)
spec = importlib.util.spec_from_file_location("augment_ops", sys.argv[1])
official = importlib.util.module_from_spec(spec)
spec.loader.exec_module(official)

records: dict[str, np.ndarray] = {}
for name in dict.fromkeys(auto_augment._RAND_TRANSFORMS + auto_augment._RAND_INCREASING_TRANSFORMS):
    argument = auto_augment.LEVEL_TO_ARG[name] is not None
    found = list(run(auto_augment, auto_augment.AugmentOp, name, (3.3, 9, 10) if argument else (9,), "bicubic"))
    if name in MOVING:
        found += run(auto_augment, auto_augment.AugmentOp, name, (9,), "bilinear")
    records |= {f"timm/{key}": pixels for key, pixels in found}
for name in official._RAND_TRANSFORMS:
    magnitudes = (9.3, 10.6, 21) if name in OWN else (10.6,)  # not clipped at 10
    found = run(official, official.AutoAugmentOp, name, magnitudes, "bicubic")
    records |= {f"evmamba/{key}": pixels for key, pixels in found}
for crop_mode, crop_pct, interpolation in (
    ("center", 0.875, "bicubic"),
    ("center", 0.93, "bicubic"),
    ("center", 1.0, "bilinear"),
    ("squash", 0.93, "bicubic"),
):
    transform = create_transform(
        24, crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
    )
    pixels = np.asarray(transform(Image.fromarray(WIDE))).transpose(1, 2, 0)
    records[f"eval/{crop_mode}/{crop_pct}/{interpolation}"] = pixels

np.savez_compressed(
    Path(__file__).with_name("augment.npz"),
    image=IMAGE,
    wide=WIDE,
    names=np.array(list(records)),
    pixels=np.stack(list(records.values())),
    versions=f"timm {timm.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}",
)
