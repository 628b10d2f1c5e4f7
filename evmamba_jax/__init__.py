"""Vision state-space models in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evmamba_jax.factory import create_model
    from evmamba_jax.models import list_models, model_card
    from evmamba_jax.preprocessing import preprocess

__version__ = "0.1.0"

__all__ = ["create_model", "list_models", "model_card", "preprocess"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: JAX takes seconds, which ``evmamba --help`` need not wait."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "preprocess":  # with the libraries that read pictures
        from evmamba_jax.preprocessing import preprocess as found
    elif name == "create_model":
        from evmamba_jax.factory import create_model as found
    else:
        from evmamba_jax import models

        found = getattr(models, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
