"""A run of seconds on the digits, with everything on: the config of the tests that start the command.

Its variant ``:convolutions`` has no scan, and so starts faster.
"""

from evmamba_jax.data.config import DataConfig
from evmamba_jax.training.config import Config, Duration, ModelConfig, OptimConfig


def get_config(variant: str = "scan") -> Config:
    depths = {"scan": (1, 0, 1, 0), "convolutions": (0, 0, 2, 0)}[variant]
    return Config(
        model=ModelConfig(
            name="evmamba_t",
            drop_path_rate=0.1,
            dtype="float32",
            options={"width": 8, "depths": depths, "patch_size": 2, "d_state": 2},
        ),
        data=DataConfig(
            name="digits",
            eval_split="test",
            image_size=8,
            crop_pct=1.0,
            in_channels=1,
            mean=(0.3,),
            std=(0.38,),
            hflip=0.0,
            num_threads=2,
        ),
        optim=OptimConfig(lr=2e-3, warmup=Duration(steps=10), ema_decay=0.9),
        batch_size=32,
        duration=Duration(steps=40),
        log_every=Duration(steps=5),
        eval_every=Duration(steps=20),
        save_every=Duration(steps=10),
        keep_last=2,
    )
