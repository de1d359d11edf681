"""Is the oracle itself right? Its forward against exact fractions, its backward against its forward by complex step."""

from fractions import Fraction

import numpy as np
import pytest

import oracle
from nbnorm import reference


def test_forward_in_exact_fractions():
    x = [3, 1, 4, 1, 5, 9, 2, 6]
    mean = Fraction(sum(x), len(x))
    var = sum((v - mean) ** 2 for v in x) / len(x)
    expected = [float(v - mean) / float(var + Fraction(1, 8)) ** 0.5 for v in x]
    y, oracle_mean, rstd = oracle.forward(np.array([x]), 1, eps=0.125)
    assert float(oracle_mean[0, 0]) == mean
    np.testing.assert_allclose(float(rstd[0, 0]), float(var + Fraction(1, 8)) ** -0.5, rtol=1e-15)
    np.testing.assert_allclose(y[0].astype(float), expected, rtol=1e-15)


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_backward_is_the_complex_step_derivative_of_forward(rng, with_weight, use_diff_of_squares):
    x = rng.standard_normal((3, 2, 5)) + 0.5
    dy = rng.standard_normal(x.shape)
    weight = rng.standard_normal((2, 5)) if with_weight else None
    bias = rng.standard_normal((2, 5))
    dx, dweight, dbias = oracle.backward(dy, x, 2, weight, 1e-3, use_diff_of_squares)

    def derivative(x, weight, bias):
        y = reference.layer_norm(x, 2, weight, bias, 1e-3, use_diff_of_squares)[0]
        return (dy * y.imag).sum() / step

    # no cancellation in a complex step, so it can be as small as one likes
    step = 1e-100
    ones = np.ones((2, 5)) if weight is None else weight
    for index in np.ndindex(x.shape):
        np.testing.assert_allclose(float(dx[index]), derivative(_step(x, index, step), weight, bias), rtol=1e-12, atol=1e-13)
    for index in np.ndindex(bias.shape):
        np.testing.assert_allclose(float(dweight[index]), derivative(x, _step(ones, index, step), bias), rtol=1e-12)
        np.testing.assert_allclose(float(dbias[index]), derivative(x, weight, _step(bias, index, step)), rtol=1e-12)


@pytest.mark.parametrize("with_weight", [False, True])
def test_backward_of_rms_norm_is_the_complex_step_derivative(rng, with_weight):
    x, dy = rng.standard_normal((2, 3, 2, 5)) + 0.5
    weight = rng.standard_normal((2, 5)) if with_weight else None
    dx, dweight, _ = oracle.backward(dy, x, 2, weight, 1e-3, is_rms=True)

    def derivative(x, weight):
        return (dy * reference.rms_norm(x, 2, weight, 1e-3)[0].imag).sum() / step

    step = 1e-100
    ones = np.ones((2, 5)) if weight is None else weight
    for index in np.ndindex(x.shape):
        np.testing.assert_allclose(float(dx[index]), derivative(_step(x, index, step), weight), rtol=1e-12, atol=1e-13)
    for index in np.ndindex(ones.shape):
        np.testing.assert_allclose(float(dweight[index]), derivative(x, _step(ones, index, step)), rtol=1e-12)


def _step(array, index, size):
    result = array.astype(complex)
    result[index] += 1j * size
    return result
