"""Looking at models: what they cost, what they see, how they scan."""

from evmamba_jax.counting import count_flops, count_parameters, flops_by_operation, xla_flops

__all__ = ["count_flops", "count_parameters", "flops_by_operation", "xla_flops"]
