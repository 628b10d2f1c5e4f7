"""Looking at models: what they cost, what they see, how they scan, and where they err."""

from evmamba_jax.analysis.activation_maps import ActivationMap, activation_map, rollout
from evmamba_jax.analysis.compare import Comparison, compare_models
from evmamba_jax.analysis.decay_maps import DecayMap, decay_map, decay_ratio
from evmamba_jax.analysis.embeddings import Features, embeddings_of
from evmamba_jax.analysis.gradcam import GradCam, grad_cam
from evmamba_jax.analysis.knn import Neighbours, Probe, knn_accuracy, knn_classes, linear_probe, neighbours
from evmamba_jax.analysis.receptive_field import ReceptiveField, area_shares, effective_receptive_field
from evmamba_jax.analysis.scanning import scan_layers
from evmamba_jax.analysis.speed import Throughput, throughput
from evmamba_jax.analysis.stages import StageMaps, dense_stage_maps, stage_maps
from evmamba_jax.analysis.tide import DetectionErrors, Mistake, detection_errors
from evmamba_jax.analysis.wrong_pixels import PixelErrors, pixel_errors
from evmamba_jax.counting import count_flops, count_parameters, flops_by_operation, xla_flops

__all__ = [
    "ActivationMap",
    "Comparison",
    "DecayMap",
    "DetectionErrors",
    "Features",
    "GradCam",
    "Mistake",
    "Neighbours",
    "PixelErrors",
    "Probe",
    "ReceptiveField",
    "StageMaps",
    "Throughput",
    "activation_map",
    "area_shares",
    "compare_models",
    "count_flops",
    "count_parameters",
    "decay_map",
    "decay_ratio",
    "dense_stage_maps",
    "detection_errors",
    "effective_receptive_field",
    "embeddings_of",
    "flops_by_operation",
    "grad_cam",
    "knn_accuracy",
    "knn_classes",
    "linear_probe",
    "neighbours",
    "pixel_errors",
    "rollout",
    "scan_layers",
    "stage_maps",
    "throughput",
    "xla_flops",
]
