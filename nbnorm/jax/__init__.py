"""The norms in JAX's programs on the CPU: under jit, grad and vmap."""

from nbnorm.jax.functional import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
