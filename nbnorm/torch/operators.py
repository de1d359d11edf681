"""Both norms as operators of torch, which a graph has as one step: torch.compile's, torch.export's, a trace's.

A gradient that was not asked for is an empty tensor, since an operator returns no None.
"""

from functools import partial

import torch

from nbnorm.torch import functions


def _operator(name, arguments, returns):
    """A decorator; the schema is written out, since what torch makes of annotations changed with its versions."""
    return torch.library.custom_op(f"nbnorm::{name}", mutates_args=(), schema=f"({arguments}) -> {returns}")


@_operator("layer_norm", "Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps", "Tensor")
def layer_norm(x, normalized_shape, weight, bias, eps):
    return functions.forward(x, tuple(normalized_shape), weight, bias, eps, False)


@_operator("rms_norm", "Tensor x, SymInt[] normalized_shape, Tensor? weight, float? eps", "Tensor")
def rms_norm(x, normalized_shape, weight, eps):
    return functions.forward(x, tuple(normalized_shape), weight, None, eps, True)


@_operator(
    "layer_norm_backward",
    "Tensor dy, Tensor x, SymInt[] normalized_shape, Tensor? weight, float eps, bool[] output_mask",
    "(Tensor, Tensor, Tensor)",
)
def layer_norm_backward(dy, x, normalized_shape, weight, eps, output_mask):
    grads = functions.backward(dy, x, tuple(normalized_shape), weight, eps, tuple(output_mask), False)
    return tuple(_present(grad, x) for grad in grads)


@_operator(
    "rms_norm_backward",
    "Tensor dy, Tensor x, SymInt[] normalized_shape, Tensor? weight, float? eps, bool[] output_mask",
    "(Tensor, Tensor)",
)
def rms_norm_backward(dy, x, normalized_shape, weight, eps, output_mask):
    dx, dweight, _ = functions.backward(dy, x, tuple(normalized_shape), weight, eps, tuple(output_mask), True)
    return _present(dx, x), _present(dweight, x)


def _present(gradient, x):
    return x.new_empty(0) if gradient is None else gradient


def _like_y(x, *_):
    return x.new_empty(x.shape, dtype=x.dtype if x.is_floating_point() else torch.float64)


def _like_gradients(dy, x, normalized_shape, weight, eps, output_mask):
    parameter = x if weight is None else weight
    likes = (x, x.shape), *[(parameter, normalized_shape)] * (len(output_mask) - 1)
    return tuple(
        like.new_empty(shape) if wanted else x.new_empty(0) for (like, shape), wanted in zip(likes, output_mask, strict=True)
    )


def _keep(ctx, inputs, output):
    x, ctx.normalized_shape, weight, *_, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _gradients(operator, ctx, dy):
    x, weight = ctx.saved_tensors
    needs_x, _, *needs_parameters, _ = ctx.needs_input_grad
    mask = needs_x, *needs_parameters
    grads = operator(dy, x, ctx.normalized_shape, weight, ctx.eps, mask)
    dx, *dparameters = (grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))
    return dx, None, *dparameters, None


for _forward, _backward in ((layer_norm, layer_norm_backward), (rms_norm, rms_norm_backward)):
    _forward.register_fake(_like_y)
    _backward.register_fake(_like_gradients)
    _forward.register_autograd(partial(_gradients, _backward), setup_context=_keep)
