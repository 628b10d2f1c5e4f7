"""Vim's detector: a cascade over a plain backbone, as Vim's copy of Detectron2 builds it.

It differs from mmdet's cascade in more than its pyramid. One box serves all classes; only the first round is sampled,
and the later ones train on all that it moved; there is one mask head, trained on the first round and asked for the
boxes of the last; rounds average probabilities. An object whose box another one has too is trained for itself here, in
Detectron2 for the first of the two.

Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (arXiv:2203.16527); hustvl/Vim
``det/projects/ViTDet/configs/COCO/cascade_mask_rcnn_vimdet_t_100ep_adj1.py`` at dd0358a and what it is built on.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from evmamba_jax.detection.anchors import Anchors, Detectron2Anchors
from evmamba_jax.detection.boxes import DeltaCoder
from evmamba_jax.detection.matching import Matcher
from evmamba_jax.detection.proposals import Rules
from evmamba_jax.detection.rcnn import BOX_SIZE, RCNN, STRIDES, Heads
from evmamba_jax.detection.rounds import Round
from evmamba_jax.errors import UserError
from evmamba_jax.heads.conv import ChannelNorm
from evmamba_jax.heads.rcnn import BoxHead, MaskHead, RPNHead, xavier_fill
from evmamba_jax.heads.simple_pyramid import SimplePyramid
from evmamba_jax.layers import initializers as init
from evmamba_jax.models.vim import Vim, VimConfig
from evmamba_jax.weights.convert import register, table
from evmamba_jax.weights.detectors import simple_pyramid, vim_heads
from evmamba_jax.weights.layers import Row, below


def anchors_of(octave_base_scale: float = 8.0) -> Anchors:
    """Return the detector's anchors, three a cell: the side of the square one, in strides."""
    return Detectron2Anchors(strides=STRIDES, scales=(octave_base_scale,))


def _round(overlap: float, weight: int) -> Round:
    stds = (1 / weight, 1 / weight, 2 / weight, 2 / weight)
    matcher = Matcher(positive=overlap, negative=overlap, minimum=None)
    return Round(DeltaCoder(stds, smallest=-math.inf), matcher, sampled=overlap == 0.5)


class VimCascade(RCNN):
    """The detector, in three rounds that ask for more and more overlap; see the module.

    Args:
        pyramid: makes the levels from the last map of a backbone that has one size.

    Further ones as :class:`RCNN` has them.

    Raises:
        UserError: a backbone of four sizes, which has no such pyramid.
    """

    rounds = (_round(0.5, 10), _round(0.6, 20), _round(0.7, 30))
    rules = Rules(
        matcher=Matcher(positive=0.7, negative=0.3, minimum=0.0, reassigns=False),
        coder=DeltaCoder(smallest=-math.inf),
        trained="all",
    )
    heads = Heads(
        rpn=functools.partial(RPNHead, convs=2),
        box=functools.partial(BoxHead, convs=4, norm=ChannelNorm, fcs=1, fc_init=xavier_fill, class_agnostic=True),
        mask=functools.partial(MaskHead, norm=ChannelNorm, logits_init=init.normal(0.001)),
    )
    body = ((VimConfig, {"image_size": 1024, "rope": True}),)
    fixed_count = True
    gradient_share = 1 / 3
    mean_of = "probabilities"
    masks_end = True

    def __init__(self, backbone: Any, widths: Sequence[int], pyramid: SimplePyramid | None, *args: Any, **options: Any):
        if pyramid is None:
            raise UserError(
                "vim_cascade makes its pyramid from maps of one size, and this backbone has four: take mask_rcnn or "
                "cascade_mask_rcnn"
            )
        if isinstance(backbone, Vim):
            # The last norm, of which no map is made; officially it is gone too.
            backbone.norm = None  # pyrefly: ignore[bad-assignment]
        super().__init__(backbone, widths, pyramid, *args, **options)

    @classmethod
    def pyramid_of(cls, width: int) -> Callable[..., SimplePyramid]:
        """Return what makes the pyramid of a backbone that has one size."""
        return functools.partial(SimplePyramid, width=width)

    def neck_of(self, widths: Sequence[int], width: int, **layer: Any) -> None:
        """Return None: the pyramid gives the levels."""


def head_rows(model: VimCascade) -> list[Row]:
    """Return the official names of pyramid and heads, as Detectron2's checkpoints have them."""
    of_pyramid = below("pyramid", "backbone", simple_pyramid(model.pyramid.stride))
    return [*of_pyramid, *vim_heads(BOX_SIZE, len(model.rounds))]


_BODY = "backbone.net"
register(VimCascade, lambda model: [*below("backbone", _BODY, table(model.backbone)), *head_rows(model)], _BODY)
