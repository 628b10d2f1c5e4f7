"""VMamba-B (ssm_ratio 2, 15 blocks in stage 3) on ImageNet-1K, 224 px.

Published top-1: 83.9 (arXiv:2401.10166, table 6). Not yet run here.
"""

from configs._vmamba import recipe
from evmamba_jax.training.config import Config


def get_config() -> Config:
    """Return the configuration."""
    return recipe("vmamba_b", drop_path_rate=0.6)
