"""A small EfficientVMamba with RetinaNet on scenes of digits: a box around each of ten digits.

4.5 epochs: 4,500 steps of 4 images, 18,000 in all.

The first boxes of a newcomer: it needs no download. The scenes are made as they are read, 128x128 pixels, 3 to 8
digits that hide up to 30 % of one another; 4,000 to train, 200 of other digits to test.
"""

from evmamba_jax.data.dense_config import DetectionData
from evmamba_jax.recipes.digit_scenes import recipe
from evmamba_jax.tasks.detection import DetectionConfig, DetectorConfig


def get_config() -> DetectionConfig:
    """Return the configuration."""
    return DetectionConfig(
        detector=DetectorConfig(width=48, octave_base_scale=2.0, detections=20),
        **recipe(DetectionData, lr=3e-3, epochs=4.5, max_objects=8),
    )
