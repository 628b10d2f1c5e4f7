"""Object detection: what turns a backbone's maps into boxes."""

from evmamba_jax.detection.create import create_detector
from evmamba_jax.detection.detector import Detections
from evmamba_jax.detection.mask_rcnn import CascadeMaskRCNN, MaskRCNN
from evmamba_jax.detection.matching import Objects
from evmamba_jax.detection.retinanet import Losses, RetinaNet
from evmamba_jax.detection.vim_cascade import VimCascade

__all__ = [
    "CascadeMaskRCNN",
    "Detections",
    "Losses",
    "MaskRCNN",
    "Objects",
    "RetinaNet",
    "VimCascade",
    "create_detector",
]
