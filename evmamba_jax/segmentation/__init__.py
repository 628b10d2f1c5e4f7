"""Semantic segmentation: backbones with the head of UperNet, their loss, and the label maps of whole images."""

from evmamba_jax.segmentation.create import create_segmenter
from evmamba_jax.segmentation.inference import multi_scale, slide, to_original, whole
from evmamba_jax.segmentation.losses import cross_entropy, pixel_accuracy
from evmamba_jax.segmentation.upernet import UperNet, UperNetConfig

__all__ = [
    "UperNet",
    "UperNetConfig",
    "create_segmenter",
    "cross_entropy",
    "multi_scale",
    "pixel_accuracy",
    "slide",
    "to_original",
    "whole",
]
