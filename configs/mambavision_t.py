"""MambaVision-T on ImageNet-1K, 224 px.

Published top-1: 82.3 (arXiv:2407.08083, table 1). Not yet run here.
"""

from configs._mambavision import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("mambavision_t", mesa=0.5)
