"""Both norms as functions of torch's autograd, which eager mode and torch.func's transforms record.

A call is x, normalized_shape, weight, bias and eps, and whether it is RMS norm, which has no bias.
"""

import torch
from torch.autograd import Function, forward_ad

import nbnorm
from nbnorm.torch import derivatives


def norm(x, normalized_shape, weight, bias, eps, is_rms):
    """The norm in eager mode, recorded where that is on; forward mode is, also under `no_grad`."""
    is_recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if not (is_recorded or torch._C._are_functorch_transforms_active()):
        # as nothing is: past a function of autograd, 6 us
        return forward(x, normalized_shape, weight, bias, eps, is_rms)
    return apply(Norm, x, normalized_shape, weight, bias, eps, is_rms)


class Norm(Function):
    """Keeps x and weight; statistics are found again while a row is in the cache."""

    @staticmethod
    def forward(x, normalized_shape, weight, bias, eps, is_rms):
        return forward(x, normalized_shape, weight, bias, eps, is_rms)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.normalized_shape, weight, _, ctx.eps, ctx.is_rms = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        call = dy, x, ctx.normalized_shape, weight, ctx.eps, (needs_x, needs_weight, needs_bias), ctx.is_rms
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            dx, dweight, dbias = apply(NormBackward, *call)
        elif torch._C._functorch.is_legacy_batchedtensor(dy):
            # of torch.autograd.grad(..., is_grads_batched=True), which batches torch's own operations alone
            dx, dweight, dbias = derivatives.gradients(*call)
        else:
            dx, dweight, dbias = backward(*call)
        return dx, None, dweight, dbias, None, None

    @staticmethod
    def vmap(info, in_dims, x, normalized_shape, weight, bias, eps, is_rms):
        call = x, normalized_shape, weight, bias, eps, is_rms
        if in_dims[2] is not None or in_dims[3] is not None:
            return _each(Norm, info, in_dims, call)
        # rows are independent
        return apply(Norm, x.movedim(in_dims[0], 0), *call[1:]), 0


class NormBackward(Function):
    """dx, dweight and dbias, None where not asked for; their own gradients are found by torch's operations."""

    @staticmethod
    def forward(dy, x, normalized_shape, weight, eps, mask, is_rms):
        return backward(dy, x, normalized_shape, weight, eps, mask, is_rms)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, ctx.normalized_shape, weight, ctx.eps, ctx.mask, ctx.is_rms = inputs
        ctx.save_for_backward(dy, x, weight)

    @staticmethod
    def backward(ctx, *doubles):
        dy, x, weight = ctx.saved_tensors
        call = dy, x, ctx.normalized_shape, weight, ctx.eps, ctx.mask, ctx.is_rms
        of_dy, of_x, of_weight = derivatives.of_gradients(call, doubles)
        return of_dy, of_x, None, of_weight, None, None, None

    @staticmethod
    def vmap(info, in_dims, dy, x, normalized_shape, weight, eps, mask, is_rms):
        # dweight and dbias are sums of each sample's own rows
        return _each(NormBackward, info, in_dims, (dy, x, normalized_shape, weight, eps, mask, is_rms))


def forward(x, normalized_shape, weight, bias, eps, is_rms):
    x, weight, bias = map(_as_values, (x, weight, bias))
    if is_rms:
        return nbnorm.rms_norm(x, normalized_shape, weight, eps)
    return nbnorm.layer_norm(x, normalized_shape, weight, bias, eps)


def backward(dy, x, normalized_shape, weight, eps, mask, is_rms):
    dy, x, weight = map(_as_values, (dy, x, weight))
    if is_rms:
        return *nbnorm.rms_norm_backward(dy, x, normalized_shape, weight, eps, output_mask=mask[:2]), None
    return tuple(nbnorm.layer_norm_backward(dy, x, normalized_shape, weight, eps, output_mask=mask))


def _as_values(tensor):
    """Past errors: of what requires grad, where that is on; of the negative of other memory; of zeros without memory."""
    if tensor is None:
        return None
    if tensor.requires_grad and torch.is_grad_enabled():
        tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor


def apply(function, *arguments):
    """`function.apply`; where no transform is active, without binding arguments to a signature, 23 us of its 29."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(Function, function).apply(*arguments)


def _each(function, info, in_dims, call):
    """A vmap that calls the function for each sample."""
    results = []
    for sample in range(info.batch_size):
        chosen = [
            value.select(dim, sample) if isinstance(dim, int) else value for dim, value in zip(in_dims, call, strict=True)
        ]
        results.append(apply(function, *chosen))
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, tuple(None if part is None else 0 for part in stacked)
