"""Vision state-space models in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evmamba_jax.factory import create_model
    from evmamba_jax.models import list_models, model_card

__version__ = "0.1.0"

__all__ = ["create_model", "list_models", "model_card"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: JAX takes seconds, which ``evmamba --help`` need not wait."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evmamba_jax.factory import create_model
    from evmamba_jax.models import list_models, model_card

    globals().update(create_model=create_model, list_models=list_models, model_card=model_card)
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
