"""A small EfficientVMamba on Fashion-MNIST: 60000 images of clothes to train, 10000 to test, 28x28 pixels, grey.

The released recipe in small: warm-up by the step, light augmentation, no moving average. 2 epochs: 1,874 steps of 64
images, 119,936 in all; 85 % of the test images are then right (benchmarks/results/fashion_mnist.md). The images are
Debian's: apt-get install dataset-fashion-mnist.
"""

from evmamba_jax.recipes.fashion_mnist import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    # Scans over 7x7 and 4x4 maps, the first padded to 8x8; inverted residuals over 2x2 and 1x1.
    return recipe("evmamba_t", batch_size=64, epochs=2, evaluations=4, width=16, depths=(1, 1, 1, 1))
