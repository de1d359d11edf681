"""The gradients once more, in torch's own operations, which can be batched, and derived any number of times."""

import torch


def of_gradients(call, doubles):
    """Those with respect to dy, x and weight, of what has the gradients `doubles` with respect to a call of `gradients`."""
    dy, x, normalized_shape, weight, *options = call
    # an absent weight is none of the operands
    operands = [dy, x] if weight is None else [dy, x, weight]

    def asked(dy, x, weight=None):
        return tuple(grad for grad in gradients(dy, x, normalized_shape, weight, *options) if grad is not None)

    of_operands = torch.func.vjp(asked, *operands)[1]
    found = of_operands(tuple(double for double in doubles if double is not None))
    return *found, *[None] * (3 - len(found))


def gradients(dy, x, normalized_shape, weight, eps, mask, is_rms):
    """dx, dweight and dbias, None where the mask has no True, as docs/derivation.md has them."""
    ndim = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    row, batch = tuple(range(-ndim, 0)), tuple(range(x.ndim - ndim))
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    x_wide, dy = x.to(wide), dy.to(wide)
    g = dy if weight is None else dy * weight
    centred = x_wide if is_rms else x_wide - x_wide.mean(row, keepdim=True)
    rstd = (centred.square().mean(row, keepdim=True) + eps).rsqrt()
    x_hat = centred * rstd
    dx = g - x_hat * (g * x_hat).mean(row, keepdim=True)
    if not is_rms:
        dx = dx - g.mean(row, keepdim=True)
    dweight, dbias = (term.sum(batch) if batch else term for term in (dy * x_hat, dy))
    sum_dtype = x.dtype if weight is None else weight.dtype
    found = (dx * rstd).to(x.dtype), dweight.to(sum_dtype), dbias.to(sum_dtype)
    return tuple(grad if wanted else None for grad, wanted in zip(found, mask, strict=True))
