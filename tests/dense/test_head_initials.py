"""The deviation of initial values of heads: the official one, or one's own."""

import numpy as np
import pytest
from flax import nnx

from evmamba_jax.detection import create_detector
from evmamba_jax.errors import UserError
from evmamba_jax.heads.retinanet import RetinaNetHead
from evmamba_jax.segmentation import create_segmenter

BODY = {"backbone": "evmamba_t", "backbone_options": {"width": 8, "depths": (0, 0, 0, 0)}}


def deviations(*layers):
    return [float(np.std(layer.kernel)) for layer in layers]


def heads(kind, **options):
    """Return the layers that take the deviation."""
    if kind == "upernet":
        model = create_segmenter(kind, **BODY, num_classes=100, width=64, aux_width=64, **options)
        return model.decode_head.classifier.conv, model.auxiliary_head.classifier.conv
    model = create_detector(kind, **BODY, num_classes=9, width=32, **options)
    if kind == "retinanet":
        head = model.head
        return *head.cls_tower, *head.reg_tower, head.cls, head.reg
    return *model.rpn.convs, model.rpn.reg


@pytest.mark.parametrize("kind", ["upernet", "retinanet", "mask_rcnn"])
def test_narrow_heads_may_start_from_larger_values(kind):
    np.testing.assert_allclose(deviations(*heads(kind)), 0.01, rtol=0.15)
    np.testing.assert_allclose(deviations(*heads(kind, init_std=0.2)), 0.2, rtol=0.15)


def test_the_prior_of_classes_does_not_depend_on_it():
    head = RetinaNetHead(2, 3, 8, 8, init_std=0.3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(head.cls.bias, -np.log(99), rtol=1e-6)


def test_no_deviation_is_a_mistake():
    for create, name in ((create_segmenter, "upernet"), (create_detector, "retinanet")):
        with pytest.raises(UserError, match="init_std"):
            create(name, **BODY, init_std=0.0)
