"""Looking at models: what they cost, what they see, how they scan."""

from evmamba_jax.analysis.activation_maps import ActivationMap, activation_map, rollout
from evmamba_jax.analysis.decay_maps import DecayMap, decay_map, decay_ratio
from evmamba_jax.analysis.gradcam import GradCam, grad_cam
from evmamba_jax.analysis.receptive_field import ReceptiveField, area_shares, effective_receptive_field
from evmamba_jax.analysis.scanning import scan_layers
from evmamba_jax.analysis.speed import Throughput, throughput
from evmamba_jax.counting import count_flops, count_parameters, flops_by_operation, xla_flops

__all__ = [
    "ActivationMap",
    "DecayMap",
    "GradCam",
    "ReceptiveField",
    "Throughput",
    "activation_map",
    "area_shares",
    "count_flops",
    "count_parameters",
    "decay_map",
    "decay_ratio",
    "effective_receptive_field",
    "flops_by_operation",
    "grad_cam",
    "rollout",
    "scan_layers",
    "throughput",
    "xla_flops",
]
