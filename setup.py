"""The one thing that pyproject.toml cannot say: the wheel has ``configs/`` inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["evmamba_jax*", "pallas_kernels*"]), "evmamba_jax.configs"],
    package_dir={"evmamba_jax.configs": "configs"},
    package_data={
        "evmamba_jax": [
            *("data/imagenet_classes.txt", "data/coco_classes.txt", "segmentation/ade20k_classes.txt"),
            "py.typed",
        ],
        "evmamba_jax.configs": ["**/*.py"],
        "pallas_kernels": ["py.typed"],
    },
)
