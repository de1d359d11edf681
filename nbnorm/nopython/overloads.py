"""The public functions for Numba's compiler: which types a call may have, and what it returns.

Importing this teaches Numba the functions. What compiles a call, and what makes one, is imported when that happens.
Functions of users that are on disk have Numba import this module by its name.

All forwards are one kind of call, and all backwards another: an operand that a function does not have is None. Another norm
is two overloads here, whose names are in `served.FUNCTIONS`.
"""

import json

from numba import types
from numba.extending import overload

from nbnorm import functional
from nbnorm.calls.checks import LAYER_GRADIENTS, RMS_GRADIENTS
from nbnorm.calls.problem import BackwardCall, ForwardCall
from nbnorm.functional import (
    AddLayerNormResult,
    AddNormResult,
    AddRMSNormResult,
    LayerNormGrads,
    LayerNormResult,
    RMSNormGrads,
    RMSNormResult,
)
from nbnorm.nopython import roles

# of requests, which compiled functions keep: of the arguments of all that a table leads to
VERSION = 1


@overload(functional.layer_norm, prefer_literal=True, target="cpu")
def _layer_norm(
    x, normalized_shape, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, out=None, return_stats=False,
    stream=None,
):  # fmt: skip
    kinds = ForwardCall(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats, stream)
    call, with_stats = _forward("layer_norm", kinds), roles.known("return_stats", return_stats)

    def layer_norm(
        x, normalized_shape, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, out=None, return_stats=False,
        stream=None,
    ):  # fmt: skip
        operands = x, None, normalized_shape, weight, bias, eps, use_diff_of_squares
        y, _, mean, rstd = call(operands, (out, None))
        return LayerNormResult(y, mean, rstd) if with_stats else y

    return layer_norm


@overload(functional.layer_norm_backward, prefer_literal=True, target="cpu")
def _layer_norm_backward(
    dy, x, normalized_shape, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None,
    output_mask=(True, True, True), out=None, stream=None,
):  # fmt: skip
    options = eps, use_diff_of_squares, mean, rstd, output_mask, out, stream
    kinds = BackwardCall(dy, x, normalized_shape, weight, *options)
    call, has_out = _backward("layer_norm_backward", kinds), not roles.is_absent(out)

    def layer_norm_backward(
        dy, x, normalized_shape, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None,
        output_mask=(True, True, True), out=None, stream=None,
    ):  # fmt: skip
        operands = dy, None, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd
        dx, dweight, dbias = call(operands, out if has_out else (None, None, None))
        return LayerNormGrads(dx, dweight, dbias)

    return layer_norm_backward


@overload(functional.rms_norm, prefer_literal=True, target="cpu")
def _rms_norm(x, normalized_shape, weight=None, eps=None, out=None, return_stats=False, stream=None):
    options = {"eps": eps, "out": out, "return_stats": return_stats, "stream": stream}
    call = _forward("rms_norm", ForwardCall(x, normalized_shape, weight, is_rms=True, **options))
    with_stats, has_eps, usual_eps = roles.known("return_stats", return_stats), not roles.is_absent(eps), roles.usual_eps(x)

    def rms_norm(x, normalized_shape, weight=None, eps=None, out=None, return_stats=False, stream=None):
        operands = x, None, normalized_shape, weight, None, eps if has_eps else usual_eps, False
        y, _, _, rstd = call(operands, (out, None))
        return RMSNormResult(y, rstd) if with_stats else y

    return rms_norm


@overload(functional.rms_norm_backward, prefer_literal=True, target="cpu")
def _rms_norm_backward(
    dy, x, normalized_shape, weight=None, eps=None, rstd=None, output_mask=(True, True), out=None, stream=None
):
    options = {"rstd": rstd, "output_mask": output_mask, "out": out, "stream": stream, "is_rms": True}
    call = _backward("rms_norm_backward", BackwardCall(dy, x, normalized_shape, weight, eps, **options))
    has_out, has_eps, usual_eps = not roles.is_absent(out), not roles.is_absent(eps), roles.usual_eps(x)

    def rms_norm_backward(
        dy, x, normalized_shape, weight=None, eps=None, rstd=None, output_mask=(True, True), out=None, stream=None
    ):
        operands = dy, None, x, normalized_shape, weight, eps if has_eps else usual_eps, False, None, rstd
        dx, dweight, _ = call(operands, (out[0], out[1], None) if has_out else (None, None, None))
        return RMSNormGrads(dx, dweight)

    return rms_norm_backward


@overload(functional.add_layer_norm, prefer_literal=True, target="cpu")
def _add_layer_norm(
    x, residual, normalized_shape, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, out=None, total_out=None,
    return_stats=False, stream=None,
):  # fmt: skip
    options = eps, use_diff_of_squares, out, return_stats, stream, residual, total_out
    call = _forward("add_layer_norm", ForwardCall(x, normalized_shape, weight, bias, *options, is_added=True))
    with_stats, with_total = roles.known("return_stats", return_stats), roles.is_wanted(total_out)

    def add_layer_norm(
        x, residual, normalized_shape, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, out=None,
        total_out=None, return_stats=False, stream=None,
    ):  # fmt: skip
        operands = x, residual, normalized_shape, weight, bias, eps, use_diff_of_squares
        y, total, mean, rstd = call(operands, (out, total_out if with_total else None))
        return AddLayerNormResult(y, total, mean, rstd) if with_stats else AddNormResult(y, total)

    return add_layer_norm


@overload(functional.add_layer_norm_backward, prefer_literal=True, target="cpu")
def _add_layer_norm_backward(
    dy, dtotal, total, normalized_shape, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None,
    output_mask=(True, True, True), out=None, stream=None,
):  # fmt: skip
    options = eps, use_diff_of_squares, mean, rstd, output_mask, out, stream, dtotal
    kinds = BackwardCall(dy, total, normalized_shape, weight, *options, is_added=True)
    call, has_out = _backward("add_layer_norm_backward", kinds), not roles.is_absent(out)

    def add_layer_norm_backward(
        dy, dtotal, total, normalized_shape, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None,
        output_mask=(True, True, True), out=None, stream=None,
    ):  # fmt: skip
        operands = dy, dtotal, total, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd
        dx, dweight, dbias = call(operands, out if has_out else (None, None, None))
        return LayerNormGrads(dx, dweight, dbias)

    return add_layer_norm_backward


@overload(functional.add_rms_norm, prefer_literal=True, target="cpu")
def _add_rms_norm(
    x, residual, normalized_shape, weight=None, eps=None, out=None, total_out=None, return_stats=False, stream=None
):
    options = {"eps": eps, "out": out, "return_stats": return_stats, "stream": stream, "total_out": total_out}
    kinds = ForwardCall(x, normalized_shape, weight, residual=residual, is_rms=True, is_added=True, **options)
    call, has_eps, usual_eps = _forward("add_rms_norm", kinds), not roles.is_absent(eps), roles.usual_eps(x)
    with_stats, with_total = roles.known("return_stats", return_stats), roles.is_wanted(total_out)

    def add_rms_norm(
        x, residual, normalized_shape, weight=None, eps=None, out=None, total_out=None, return_stats=False, stream=None
    ):
        operands = x, residual, normalized_shape, weight, None, eps if has_eps else usual_eps, False
        y, total, _, rstd = call(operands, (out, total_out if with_total else None))
        return AddRMSNormResult(y, total, rstd) if with_stats else AddNormResult(y, total)

    return add_rms_norm


@overload(functional.add_rms_norm_backward, prefer_literal=True, target="cpu")
def _add_rms_norm_backward(
    dy, dtotal, total, normalized_shape, weight=None, eps=None, rstd=None, output_mask=(True, True), out=None, stream=None
):
    options = {"rstd": rstd, "output_mask": output_mask, "out": out, "stream": stream, "dtotal": dtotal}
    kinds = BackwardCall(dy, total, normalized_shape, weight, eps, is_rms=True, is_added=True, **options)
    call, has_out = _backward("add_rms_norm_backward", kinds), not roles.is_absent(out)
    has_eps, usual_eps = not roles.is_absent(eps), roles.usual_eps(total)

    def add_rms_norm_backward(
        dy, dtotal, total, normalized_shape, weight=None, eps=None, rstd=None, output_mask=(True, True), out=None,
        stream=None,
    ):  # fmt: skip
        operands = dy, dtotal, total, normalized_shape, weight, eps if has_eps else usual_eps, False, None, rstd
        dx, dweight, _ = call(operands, (out[0], out[1], None) if has_out else (None, None, None))
        return RMSNormGrads(dx, dweight)

    return add_rms_norm_backward


def _forward(function, kinds):
    """The instruction for calls of a forward of these types."""
    x = kinds.x
    given = {
        "x": roles.X, "residual": roles.LIKE_X if kinds.is_added else roles.BESIDE, "normalized_shape": roles.SHAPE,
        "weight": roles.ROW, "bias": roles.ROW, **roles.options(kinds),
    }  # fmt: skip
    roles.check(given, kinds)
    roles.check_out("out", kinds.out, x.ndim, x.dtype)
    with_total = kinds.is_added and roles.is_wanted(kinds.total_out)
    if with_total:
        roles.check_out("total_out", kinds.total_out, x.ndim, x.dtype)
    roles.check_stream(kinds.stream)
    with_stats = roles.known("return_stats", kinds.return_stats)
    like_x = _array(x.dtype, x.ndim)
    results = (
        (roles.LIKE_X, like_x),
        (roles.LIKE_X, like_x if with_total else types.none),
        (roles.STATISTICS, like_x if with_stats and not kinds.is_rms else types.none),
        (roles.STATISTICS, like_x if with_stats else types.none),
    )
    request = _request(function, kinds, ("x", "residual", "weight", "bias"), with_total=with_total)
    return _calling(request, given, results)


def _backward(function, kinds):
    """The same of a backward."""
    x, weight = kinds.x, kinds.weight
    given = {
        "dy": roles.LIKE_X, "dtotal": roles.BESIDE, "total" if kinds.is_added else "x": roles.X,
        "normalized_shape": roles.SHAPE, "weight": roles.ROW, **roles.options(kinds), "mean": roles.STATISTICS,
        "rstd": roles.STATISTICS,
    }  # fmt: skip
    roles.check(given, kinds)
    if not kinds.is_rms:
        roles.check_both(kinds.mean, kinds.rstd)
    roles.check_stream(kinds.stream)
    gradients = RMS_GRADIENTS if kinds.is_rms else LAYER_GRADIENTS
    entries = roles.each("output_mask", kinds.output_mask, gradients)
    mask = tuple(roles.known(f"output_mask[{i}]", entry) for i, entry in enumerate(entries))
    like_x = _array(x.dtype, x.ndim)
    like_weight = _array((x if roles.is_absent(weight) else weight).dtype, roles.dimensions(kinds.normalized_shape))
    made = (roles.LIKE_X, like_x), (roles.ROW, like_weight), (roles.ROW, like_weight)
    for i, given_out in enumerate(roles.each("out", kinds.out, gradients)):
        roles.check_out(f"out[{i}]", given_out, made[i][1].ndim, made[i][1].dtype, mask[i])
    # in the place of a bias that there is not, nothing is asked for
    wanted = (*mask, False)[:3]
    results = tuple((role, kind if is_wanted else types.none) for (role, kind), is_wanted in zip(made, wanted, strict=True))
    request = _request(function, kinds, ("dy", "dtotal", "x", "weight", "mean", "rstd"), output_mask=mask)
    return _calling(request, given, results)


def _array(dtype, ndim):
    return types.Array(dtype, ndim, "C")


def _calling(request, given, results):
    # by who compiles a call
    from nbnorm.nopython.instructions import calling

    return calling(request, (*given.values(),), results)


def _request(function, kinds, operands, **choices):
    """What a compiled function asks for: a function, and the dtypes of its operands."""
    found = {name: getattr(kinds, name) for name in operands}
    dtypes = {name: None if roles.is_absent(kind) else str(kind.dtype) for name, kind in found.items()}
    return json.dumps({"version": VERSION, "function": function, **dtypes, **choices})
