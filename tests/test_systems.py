"""Do the examples of torch, TensorRT-LLM, labml and lucid give here what they give there? In plain NumPy, without them."""

import numpy as np
import pytest

import nbnorm
import oracle
from tolerances import assert_y


@pytest.mark.parametrize(
    ("shape", "normalized_shape"),
    [((4, 10), 10), ((2, 10, 64), 64), ((2, 8, 8, 128), 128), ((20, 5, 10, 10), (5, 10, 10))],
)
def test_torch_examples(rng, shape, normalized_shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    ln = nbnorm.LayerNorm(normalized_shape)
    y = ln(x)
    assert y.dtype == np.float32
    assert_y(y, x, len(ln.normalized_shape), ln.weight, ln.bias)


def test_torch_transformer_block(rng):
    x, attention = rng.standard_normal((2, 2, 10, 64), dtype=np.float32)
    norm1 = nbnorm.LayerNorm(64)
    assert_y(norm1(x + attention), x + attention, 1)


def test_torch_positional_arguments_and_no_affine():
    ln = nbnorm.LayerNorm(10, 1e-5, False)
    assert ln.weight is None
    assert ln.bias is None
    assert ln.state_dict() == {}
    assert nbnorm.LayerNorm(10, 1e-5, True, False, "cpu", np.float64).weight.dtype == np.float64


@pytest.mark.compiled
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("shape", [(8, 128, 1024), (1024, 1024)])
def test_tensorrt_llm_examples(rng, shape, use_diff_of_squares):
    x = rng.standard_normal(shape, dtype=np.float32)
    weight, bias = rng.standard_normal((2, 1024), dtype=np.float32)
    y = nbnorm.layer_norm(x, 1024, weight, bias, 1e-05, use_diff_of_squares)
    np.testing.assert_allclose(y, oracle.forward(x, 1, weight, bias)[0].astype(np.float64), rtol=2e-6, atol=2e-6)


def test_labml_example():
    x = np.zeros([2, 3, 2, 4])
    ln = nbnorm.LayerNorm(x.shape[2:])
    y = ln(x)
    assert y.shape == x.shape
    assert ln.weight.shape == (2, 4)
    np.testing.assert_array_equal(y, x)


@pytest.mark.compiled
@pytest.mark.parametrize(("shape", "normalized_shape"), [((32, 64, 512), 512), ((8, 1, 28, 28), (28, 28))])
@pytest.mark.parametrize("bias", [True, False])
def test_lucid_examples(rng, shape, normalized_shape, bias):
    x = rng.standard_normal(shape, dtype=np.float32)
    ln = nbnorm.LayerNorm(normalized_shape, bias=bias)
    assert (ln.bias is not None) == bias
    assert_y(ln(x), x, len(ln.normalized_shape), ln.weight, ln.bias)
    assert ln.extra_repr() == f"{ln.normalized_shape}, eps=1e-05, elementwise_affine=True, bias={bias}"
