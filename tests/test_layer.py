"""Is LayerNorm what its signature promises, and the same as the functions?"""

import copy
import inspect
import pickle

import ml_dtypes
import numpy as np
import pytest

import nbnorm


def test_signatures_are_those_of_the_contract():
    def signature(function):
        parameters = inspect.signature(function).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        return str(inspect.Signature(plain))

    assert signature(nbnorm.LayerNorm) == (
        "(normalized_shape, eps=1e-05, elementwise_affine=True, bias=True, device=None, dtype=None, "
        "*, use_diff_of_squares=False, axis=None)"
    )
    assert signature(nbnorm.layer_norm) == (
        "(x, normalized_shape, weight=None, bias=None, eps=1e-05, use_diff_of_squares=False, "
        "*, out=None, return_stats=False, stream=None, axis=None)"
    )
    assert signature(nbnorm.layer_norm_backward) == (
        "(dy, x, normalized_shape, weight=None, eps=1e-05, use_diff_of_squares=False, "
        "*, mean=None, rstd=None, output_mask=(True, True, True), out=None, stream=None, axis=None)"
    )


def test_attributes():
    ln = nbnorm.LayerNorm([np.int64(3), 4], eps=1e-6, use_diff_of_squares=True)
    assert ln.normalized_shape == (3, 4)
    assert (ln.eps, ln.elementwise_affine, ln.use_diff_of_squares, ln.device) == (1e-6, True, True, "cpu")
    np.testing.assert_array_equal(ln.weight, np.ones((3, 4), np.float32), strict=True)
    np.testing.assert_array_equal(ln.bias, np.zeros((3, 4), np.float32), strict=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, np.float32),
        (np.float64, np.float64),
        ("float16", np.float16),
        (float, np.float64),
        (">f4", np.float32),
        ("bfloat16", ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.dtype(ml_dtypes.bfloat16), ml_dtypes.bfloat16),
    ],
)
def test_dtype(dtype, expected):
    ln = nbnorm.LayerNorm(4, dtype=dtype, device="cpu")
    assert ln.weight.dtype == ln.bias.dtype == expected
    assert ln.weight.dtype.isnative


@pytest.mark.parametrize(
    ("arguments", "has_weight", "has_bias"),
    [
        ({}, True, True),
        ({"bias": False}, True, False),
        ({"elementwise_affine": False}, False, False),
        ({"elementwise_affine": False, "bias": True}, False, False),
    ],
)
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
def test_same_as_the_functions(rng, arguments, has_weight, has_bias, use_diff_of_squares):
    x, dy = rng.standard_normal((2, 5, 3, 4), dtype=np.float32)
    ln = nbnorm.LayerNorm((3, 4), 1e-3, use_diff_of_squares=use_diff_of_squares, **arguments)
    assert (ln.weight is not None, ln.bias is not None) == (has_weight, has_bias)
    assert list(ln.state_dict()) == ["weight"] * has_weight + ["bias"] * has_bias
    for parameter in ln.state_dict().values():
        parameter[...] = rng.standard_normal((3, 4))
    y = nbnorm.layer_norm(x, (3, 4), ln.weight, ln.bias, 1e-3, use_diff_of_squares)
    np.testing.assert_array_equal(ln(x), y)
    np.testing.assert_array_equal(ln.forward(x), y)
    grads = ln.backward(dy, x)
    assert isinstance(grads, nbnorm.LayerNormGrads)
    assert (grads.dweight is not None, grads.dbias is not None) == (has_weight, has_bias)
    expected = nbnorm.layer_norm_backward(dy, x, (3, 4), ln.weight, 1e-3, use_diff_of_squares)
    for grad, value in zip(grads, expected, strict=True):
        if grad is not None:
            np.testing.assert_array_equal(grad, value)


def test_repr():
    assert repr(nbnorm.LayerNorm(512)) == "LayerNorm((512,), eps=1e-05, elementwise_affine=True, bias=True)"
    assert nbnorm.LayerNorm((28, 28), bias=False).extra_repr() == "(28, 28), eps=1e-05, elementwise_affine=True, bias=False"
    assert repr(nbnorm.LayerNorm(8, 1e-6, False)) == "LayerNorm((8,), eps=1e-06, elementwise_affine=False, bias=False)"
    assert nbnorm.LayerNorm(8, use_diff_of_squares=True).extra_repr().endswith(", use_diff_of_squares=True")


def test_state_dict_round_trip(rng):
    ln = nbnorm.LayerNorm(6)
    weight, bias = ln.weight, ln.bias
    state = {"bias": rng.standard_normal(6), "weight": rng.standard_normal(6).astype(">f8")[::-1]}
    ln.load_state_dict(state)
    assert ln.weight is weight
    assert ln.bias is bias
    np.testing.assert_array_equal(ln.weight, state["weight"].astype(np.float32))
    np.testing.assert_array_equal(ln.bias, state["bias"].astype(np.float32))
    other = nbnorm.LayerNorm(6, dtype="bfloat16")
    other.load_state_dict(ln.state_dict())
    np.testing.assert_array_equal(other.weight, ln.weight.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda ln: pickle.loads(pickle.dumps(ln))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(rng, clone):
    ln = nbnorm.LayerNorm(6, dtype=np.float64)
    ln.weight *= 2
    other = clone(ln)
    x = rng.standard_normal((2, 6))
    np.testing.assert_array_equal(other(x), ln(x))
    other.weight *= 2
    assert not np.array_equal(other(x), ln(x))


def test_a_training_step_lowers_the_loss(rng):
    x, goal = rng.standard_normal((2, 64, 8))
    ln = nbnorm.LayerNorm(8, dtype=np.float64)

    def loss():
        return ((ln(x) - goal) ** 2).mean()

    before = loss()
    for _ in range(20):
        dy = 2 * (ln(x) - goal) / goal.size
        _, dweight, dbias = ln.backward(dy, x)
        ln.weight -= 0.5 * dweight
        ln.bias -= 0.5 * dbias
    assert loss() < 0.9 * before


def test_load_state_dict_from_the_layers_own_arrays(rng):
    ln = nbnorm.LayerNorm(4)
    ln.weight[...], ln.bias[...] = old = rng.standard_normal((2, 4), dtype=np.float32)
    ln.load_state_dict({"weight": ln.bias, "bias": ln.weight})
    np.testing.assert_array_equal([ln.bias, ln.weight], old)


def test_a_subclass_may_override_forward(rng):
    class Residual(nbnorm.LayerNorm):
        def forward(self, x):
            return x + super().forward(x)

    x = rng.standard_normal((2, 4))
    np.testing.assert_array_equal(Residual(4)(x), x + nbnorm.LayerNorm(4)(x))
    assert repr(Residual(4)).startswith("Residual((4,), ")
