"""The norms in JAX's programs on the CPU: under jit, grad and vmap."""

from nbnorm.jax.functional import layer_norm, rms_norm
from nbnorm.jax.layers import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "rms_norm"]
