"""What is published about each model: sizes, accuracy, how it was evaluated, where its weights are and on what terms.

The facts stand here as numbers and texts, so that a card costs nothing and does not depend on the models' code; tests
compute parameters and FLOPs again. Accuracies and FLOPs are those of the official READMEs and, where they differ, of
the released weights rather than the paper.
"""

import dataclasses
from typing import Any, Literal

from evmamba_jax.errors import one_of


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """The facts about one model and its official weights.

    Attributes:
        name: as :func:`evmamba_jax.create_model` takes it.
        parameters: trained parameters, with the head of 1000 classes.
        flops: multiply-adds of one image of ``input_size``, by :func:`evmamba_jax.analysis.count_flops`.
        published_flops: multiply-adds as published, by the authors' counter; None where there is no figure.
        top1: published top-1 accuracy on ImageNet-1K's validation images, in percent.
        top5: the same for top-5; None where there is no figure.
        input_size: (height, width) of the images, in pixels.
        crop: side of the evaluation crop over the side that images are resized to.
        crop_mode: "center" resizes the short side to ``input_size / crop`` and cuts out the middle; "squash" resizes
            both sides to that, whatever their ratio, and cuts out the middle.
        interpolation: of that resizing.
        mean: what is subtracted from red, green and blue, which go from 0 to 1.
        std: what they are then divided by.
        paper: arXiv identifier.
        source: address of the official weights, or of the page that offers them.
        checkpoint: name of the file; None where the page alone tells.
        licence: of the official weights, by its SPDX identifier, or "none stated".
        licence_note: where that is stated, and what follows.
        note: what else to know about the weights and figures.
    """

    name: str
    parameters: int
    flops: int
    published_flops: float | None
    top1: float
    top5: float | None
    source: str
    checkpoint: str | None
    paper: str
    licence: str
    licence_note: str
    input_size: tuple[int, int] = (224, 224)
    crop: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    note: str = ""


# fmt: off
_FIGURES = {
    #                       parameters    multiply-adds  published   top-1  top-5
    "evmamba_t":           (6_493_660,      787_921_152,       0.8e9, 76.5, None),
    "evmamba_s":          (11_273_688,    1_317_888_000,       1.3e9, 78.7, None),
    "evmamba_b":          (33_717_136,    3_951_363_072,       4.0e9, 81.8, None),
    "vmamba_t":           (30_249_064,    4_875_843_072,       4.9e9, 82.6, None),
    "vmamba_t_s2l5":      (30_705_832,    4_824_588_288,       4.9e9, 82.5, None),
    "vmamba_s":           (50_147_752,    8_667_568_128,       8.7e9, 83.6, None),
    "vmamba_s_s1l20":     (49_012_840,    8_568_897_024,       8.6e9, 83.3, None),
    "vmamba_b":           (88_557_800,   15_294_668_800,      15.4e9, 83.9, None),
    "vmamba_b_s1l20":     (86_614_504,   15_163_107_328,      15.2e9, 83.8, None),
    "vmamba_t_v0":        (22_893_448,    5_597_700_096,       5.6e9, 82.2, None),
    "vmamba_s_v0":        (44_417_416,   11_181_987_840,      11.2e9, 83.5, None),
    "vmamba_b_v0":        (76_254_056,   17_953_595_392,      18.0e9, 83.7, None),
    "msvmamba_n":          (6_864_136,      860_927_616,       0.9e9, 77.3, None),
    "msvmamba_m":         (11_879_272,    1_502_937_600,       1.5e9, 79.8, None),
    "msvmamba_t":         (33_046_312,    4_557_589_248,       4.6e9, 82.8, None),
    "msvmamba_t_v2":      (32_263_720,    5_099_654_016,       5.0e9, 83.0, None),
    "msvmamba_s_v2":      (50_216_296,    8_720_662_272,       8.8e9, 84.1, None),
    "msvmamba_b_v2":      (90_591_976,   16_214_731_776,      16.3e9, 84.4, None),
    "vim_t":               (7_148_008,    1_819_227_648,       1.5e9, 76.1, 93.0),
    "vim_s":              (25_796_584,    5_904_264_192,       5.3e9, 80.5, 95.1),
    "vim_b":              (97_598_440,   20_871_763_968,        None, 81.9, 95.8),
    "vim_t_stride8":       (7_250_344,    6_741_179_904,        None, 78.3, 94.2),
    "vim_s_stride8":      (26_001_256,   21_878_504_448,        None, 81.6, 95.4),
    "mambavision_t":      (31_794_248,    4_471_465_856,       4.4e9, 82.3, 96.2),
    "mambavision_t2":     (35_104_008,    5_122_185_856,       5.1e9, 82.7, 96.3),
    "mambavision_s":      (50_140_584,    7_496_855_424,       7.5e9, 83.3, 96.5),
    "mambavision_b":      (97_685_288,   14_979_638_784,      15.0e9, 84.2, 96.9),
    "mambavision_l":     (227_961_048,   34_879_886_384,      34.9e9, 85.0, 97.1),
    "mambavision_l2":    (241_554_824,   37_545_111_632,      37.5e9, 85.3, 97.2),
    "mambavision_l2_512": (241_554_824, 196_147_428_608,     196.3e9, 87.3, 98.4),
    "mambavision_l3_256": (739_570_472, 122_240_253_952,     122.3e9, 87.3, 98.3),
    "mambavision_l3_512": (739_570_472, 488_954_871_808,     489.1e9, 88.1, 98.6),
}
# fmt: on

_V2 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/"
_V0 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/"
_MS = "https://huggingface.co/YuhengSSS/MSVMamba/blob/main/"
_NV = "https://huggingface.co/nvidia/MambaVision-"

# Address and file; an address that ends in a slash is a folder of the file, any other a page that offers it. All
# addresses are those of the official READMEs, and so are the files where the address is a folder.
_WEIGHTS = {
    "evmamba_t": ("https://huggingface.co/TerryPei/EfficientVMamba-Tiny/tree/main", "efficient_vmamba_tiny.ckpt"),
    "evmamba_s": ("https://huggingface.co/TerryPei/EfficientVMamba-Small/tree/main", "efficient_vmamba_small.ckpt"),
    "evmamba_b": ("https://huggingface.co/TerryPei/EfficientVMamba-Base/tree/main", "efficient_vmamba_base.ckpt"),
    "vmamba_t": (_V2, "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    "vmamba_t_s2l5": (_V2, "vssm_tiny_0230_ckpt_epoch_262.pth"),
    "vmamba_s": (_V2, "vssm_small_0229_ckpt_epoch_222.pth"),
    "vmamba_s_s1l20": (_V2, "vssm1_small_0229s_ckpt_epoch_240.pth"),
    "vmamba_b": (_V2, "vssm_base_0229_ckpt_epoch_237.pth"),
    "vmamba_b_s1l20": (_V2, "vssm1_base_0229s_ckpt_epoch_225.pth"),
    "vmamba_t_v0": (_V0, "vssmtiny_dp01_ckpt_epoch_292.pth"),
    "vmamba_s_v0": (_V0, "vssmsmall_dp03_ckpt_epoch_238.pth"),
    "vmamba_b_v0": (_V0, "vssmbase_dp06_ckpt_epoch_241.pth"),
    "msvmamba_n": ("https://drive.google.com/drive/folders/1J41w3ApitQhp2O3wHmJoOs4U032uqebK", None),
    "msvmamba_m": ("https://drive.google.com/drive/folders/1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk", None),
    "msvmamba_t": ("https://drive.google.com/drive/folders/1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU", None),
    "msvmamba_t_v2": (_MS, "msvmambav3_tiny_224.pth"),
    "msvmamba_s_v2": (_MS, "msvmambav3_small_224.pth"),
    "msvmamba_b_v2": (_MS, "msvmambav3_base_224.pth"),
    "vim_t": ("https://huggingface.co/hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
    "vim_s": ("https://huggingface.co/hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
    "vim_b": ("https://huggingface.co/hustvl/Vim-base-midclstok", None),
    "vim_t_stride8": ("https://huggingface.co/hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
    "vim_s_stride8": ("https://huggingface.co/hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
    "mambavision_t": (_NV + "T-1K/resolve/main/", "mambavision_tiny_1k.pth.tar"),
    "mambavision_t2": (_NV + "T2-1K/resolve/main/", "mambavision_tiny2_1k.pth.tar"),
    "mambavision_s": (_NV + "S-1K/resolve/main/", "mambavision_small_1k.pth.tar"),
    "mambavision_b": (_NV + "B-1K/resolve/main/", "mambavision_base_1k.pth.tar"),
    "mambavision_l": (_NV + "L-1K/resolve/main/", "mambavision_large_1k.pth.tar"),
    "mambavision_l2": (_NV + "L2-1K/resolve/main/", "mambavision_large2_1k.pth.tar"),
    "mambavision_l2_512": (_NV + "L2-512-21K/resolve/main/", "mambavision_L2_21k_240m_512.pth.tar"),
    "mambavision_l3_256": (_NV + "L3-256-21K/resolve/main/", "mambavision_L3_21k_740m_256.pth.tar"),
    "mambavision_l3_512": (_NV + "L3-512-21K/resolve/main/", "mambavision_L3_21k_740m_512.pth.tar"),
}

# What holds for a family, which is the name up to the first underscore, and what is different for one model.
_FAMILIES: dict[str, dict[str, Any]] = {
    "evmamba": {
        "paper": "2403.09977",
        "licence": "Apache-2.0",
        "licence_note": "as README and Hugging Face pages say; the repository has no LICENSE file",
    },
    "vmamba": {"paper": "2401.10166", "licence": "MIT", "licence_note": "LICENSE of the repository that releases them"},
    "msvmamba": {
        "paper": "2405.14174",
        "licence": "none stated",
        "licence_note": "neither the repository nor its README names one, so all rights are reserved: ask the authors",
    },
    "vim": {
        "paper": "2401.09417",
        "licence": "Apache-2.0",
        "licence_note": "as the Hugging Face pages say; LICENSE.txt of the repository is the same",
    },
    "mambavision": {
        "paper": "2407.08083",
        "licence": "CC-BY-NC-SA-4.0",
        "licence_note": "as the README says: not for commercial use; the Hugging Face pages name the code's licence, "
        "NVIDIA Source Code License-NC, which is not for commercial use either",
        "crop": 1.0,
    },
}
_MIT_MSVMAMBA = {
    "licence": "MIT",
    "licence_note": "as the Hugging Face page says; the repository has no LICENSE file",
}
_OLD_COUNT = (
    "The published FLOPs are those that {} prints; they count the scan by an older, 2.5 times smaller convention."
)
_FINE_TUNED = "Fine-tuned from the model of stride 16 for 30 epochs."
_21K = "Pre-trained on ImageNet-21K, fine-tuned on ImageNet-1K."
_ALSO_21K = "The same model pre-trained on ImageNet-21K has top-1 {}, top-5 {}: https://huggingface.co/nvidia/MambaVision-{}-21K"
_AT_512 = f"{_21K} Neither FLOPs figure holds attention's products of queries, keys and values, {{}}e9 more."
_SQUASHED = {"input_size": (512, 512), "crop": 0.93, "crop_mode": "squash"}
_MODELS: dict[str, dict[str, Any]] = {
    "evmamba_s": {"note": "The official yaml says width 96; these weights have width 64."},
    "vmamba_t_v0": {"note": "Trained with drop path 0.1; the official yaml says 0.2."},
    "msvmamba_t_v2": _MIT_MSVMAMBA,
    "msvmamba_s_v2": _MIT_MSVMAMBA,
    "msvmamba_b_v2": _MIT_MSVMAMBA,
    "vim_t": {"note": _OLD_COUNT.format("EfficientVMamba's paper")},
    "vim_s": {"note": _OLD_COUNT.format("VMamba's paper") + " Vim's paper has top-1 80.3; these weights have 80.5."},
    "vim_t_stride8": {"note": _FINE_TUNED},
    "vim_s_stride8": {"note": _FINE_TUNED + " Vim's paper has top-1 81.4; these weights have 81.6."},
    "mambavision_t2": {"crop": 0.98},
    "mambavision_s": {"crop": 0.93},
    "mambavision_b": {"note": _ALSO_21K.format(84.9, 97.5, "B")},
    "mambavision_l": {"note": _ALSO_21K.format(86.1, 97.9, "L")},
    "mambavision_l2_512": {"note": _AT_512.format(10.3), **_SQUASHED},
    "mambavision_l3_256": {"input_size": (256, 256), "note": _21K},
    "mambavision_l3_512": {"note": _AT_512.format(22.8), **_SQUASHED},
}


def _card(name: str) -> ModelCard:
    parameters, flops, published_flops, top1, top5 = _FIGURES[name]
    address, file = _WEIGHTS[name]
    source = f"{address}{file}" if address.endswith("/") else address
    return ModelCard(
        name=name,
        parameters=parameters,
        flops=flops,
        published_flops=published_flops,
        top1=top1,
        top5=top5,
        source=source,
        checkpoint=file,
        **_FAMILIES[name.partition("_")[0]] | _MODELS.get(name, {}),
    )


CARDS = {name: _card(name) for name in _FIGURES}


def model_card(name: str) -> ModelCard:
    """Return the card of a model.

    Raises:
        UserError: an unknown name.
    """
    return one_of("model", name, CARDS)
