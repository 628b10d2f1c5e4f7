"""What the classifier of stamps shares with the detector that begins with its weights."""

from evmamba_jax.training.config import ModelConfig

# Of the classifier's training images, in [0, 1].
MEAN = (0.4, 0.4, 0.35)
STD = (0.28, 0.25, 0.26)


def backbone() -> ModelConfig:
    """Return the model: of 48x48 pixels, scans over 12x12 and 6x6 maps, inverted residuals over 3x3 and 2x2."""
    return ModelConfig(
        name="evmamba_t", drop_path_rate=0.05, dtype="float32", options={"width": 16, "depths": (1, 1, 1, 1)}
    )
