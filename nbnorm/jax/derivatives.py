"""The gradients once more, in JAX's own operations, which can be derived any number of times."""

import jax
import jax.numpy as jnp


def gradients(norm, mask, dy, x, weight):
    """dx, dweight and dbias, None where the mask has no True, as docs/derivation.md has them."""
    ndim = len(norm.normalized_shape)
    row, batch = tuple(range(-ndim, 0)), tuple(range(x.ndim - ndim))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, dy = x.astype(wide), dy.astype(wide)
    g = dy if weight is None else dy * weight
    centred = x_wide if norm.is_rms else x_wide - x_wide.mean(row, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(centred).mean(row, keepdims=True) + norm.eps)
    x_hat = centred * rstd
    dx = g - x_hat * (g * x_hat).mean(row, keepdims=True)
    if not norm.is_rms:
        dx = dx - g.mean(row, keepdims=True)
    sum_dtype = x.dtype if weight is None else weight.dtype
    found = (dx * rstd).astype(x.dtype), (dy * x_hat).sum(batch).astype(sum_dtype), dy.sum(batch).astype(sum_dtype)
    return tuple(grad if wanted else None for grad, wanted in zip(found, mask, strict=True))
