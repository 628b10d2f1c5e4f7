"""A small EfficientVMamba with UperNet on scenes of digits: which of ten digits each pixel belongs to, or the ground.

3 epochs: 3,000 steps of 4 images, 12,000 in all.

The first label map of a newcomer: it needs no download. The scenes are made as they are read, 128x128 pixels, 3 to 8
digits that hide up to 30 % of one another; 4,000 to train, 200 of other digits to test.
"""

from evmamba_jax.data.dense_config import SegmentationData
from evmamba_jax.recipes.digit_scenes import recipe
from evmamba_jax.tasks.segmentation import SegmentationConfig, SegmenterConfig


def get_config() -> SegmentationConfig:
    """Return the configuration."""
    return SegmentationConfig(
        # So narrow a head learns late from the official initial values which digit is which.
        segmenter=SegmenterConfig(width=40, aux_width=16, dropout=0.0, init_std=0.2),
        **recipe(SegmentationData, lr=6e-3, epochs=3, scale_range=(1.0, 1.0), most_of_a_class=1.0, photometric=False),
    )
