"""The public functions for Numba's compiler: which types a call may have, and what it returns.

Importing this teaches Numba the functions. What compiles a call, and what makes one, is imported when that happens.
Functions of users that are on disk have Numba import this module by its name.

Another function is an overload here, what its requests are in `served.FUNCTIONS`, and, where its kernels are called in
another way than those that there are, a factory in `entries.FACTORIES`.
"""

import json

from numba import types
from numba.extending import overload

from nbnorm import functional
from nbnorm.functional import LayerNormGrads, LayerNormResult
from nbnorm.nopython import roles

# of requests, which compiled functions keep: of the arguments of all that a table leads to
VERSION = 1


@overload(functional.layer_norm, prefer_literal=True, target="cpu")
def _layer_norm(
    x, normalized_shape, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, out=None, return_stats=False,
    stream=None,
):  # fmt: skip
    given = {"x": roles.X, "normalized_shape": roles.SHAPE, "weight": roles.ROW, "bias": roles.ROW, **roles.OPTIONS}
    roles.check(given, (x, normalized_shape, weight, bias, eps, use_diff_of_squares))
    roles.check_out("out", out, x.ndim, x.dtype)
    roles.check_stream(stream)
    with_stats = roles.known("return_stats", return_stats)
    statistics = _array(x.dtype, x.ndim) if with_stats else types.none
    results = (roles.LIKE_X, _array(x.dtype, x.ndim)), (roles.STATISTICS, statistics), (roles.STATISTICS, statistics)
    call = _calling(_request("layer_norm", x=x, weight=weight, bias=bias), given, results)

    def layer_norm(
        x, normalized_shape, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, out=None, return_stats=False,
        stream=None,
    ):  # fmt: skip
        y, mean, rstd = call((x, normalized_shape, weight, bias, eps, use_diff_of_squares), (out,))
        return LayerNormResult(y, mean, rstd) if with_stats else y

    return layer_norm


@overload(functional.layer_norm_backward, prefer_literal=True, target="cpu")
def _layer_norm_backward(
    dy, x, normalized_shape, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None,
    output_mask=(True, True, True), out=None, stream=None,
):  # fmt: skip
    given = {"dy": roles.LIKE_X, "x": roles.X, "normalized_shape": roles.SHAPE, "weight": roles.ROW, **roles.OPTIONS}
    given.update(mean=roles.STATISTICS, rstd=roles.STATISTICS)
    roles.check(given, (dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd))
    roles.check_both(mean, rstd)
    roles.check_stream(stream)
    mask = tuple(roles.known(f"output_mask[{i}]", entry) for i, entry in enumerate(roles.three("output_mask", output_mask)))
    like_x = _array(x.dtype, x.ndim)
    like_weight = _array((x if roles.is_absent(weight) else weight).dtype, roles.dimensions(normalized_shape))
    kinds = (roles.LIKE_X, like_x), (roles.ROW, like_weight), (roles.ROW, like_weight)
    for i, ((_, kind), given_out) in enumerate(zip(kinds, roles.three("out", out), strict=True)):
        roles.check_out(f"out[{i}]", given_out, kind.ndim, kind.dtype, mask[i])
    results = tuple((role, kind if wanted else types.none) for (role, kind), wanted in zip(kinds, mask, strict=True))
    request = _request("layer_norm_backward", dy=dy, x=x, weight=weight, mean=mean, rstd=rstd, output_mask=mask)
    call, has_out = _calling(request, given, results), not roles.is_absent(out)

    def layer_norm_backward(
        dy, x, normalized_shape, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None,
        output_mask=(True, True, True), out=None, stream=None,
    ):  # fmt: skip
        outs = out if has_out else (None, None, None)
        dx, dweight, dbias = call((dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd), outs)
        return LayerNormGrads(dx, dweight, dbias)

    return layer_norm_backward


def _array(dtype, ndim):
    return types.Array(dtype, ndim, "C")


def _calling(request, given, results):
    # by who compiles a call
    from nbnorm.nopython.instructions import calling

    return calling(request, (*given.values(),), results)


def _request(function, output_mask=None, **operands):
    """What a compiled function asks for: a function, and the dtypes of its operands."""
    dtypes = {name: None if roles.is_absent(kind) else str(kind.dtype) for name, kind in operands.items()}
    others = {} if output_mask is None else {"output_mask": output_mask}
    return json.dumps({"version": VERSION, "function": function, **dtypes, **others})
