"""What models cost: parameters, multiply-adds by operation, and the equations of their traced programs."""

from evmamba_jax.counting.flops import count_flops, count_parameters, flops_by_operation, xla_flops

__all__ = ["count_flops", "count_parameters", "flops_by_operation", "xla_flops"]
