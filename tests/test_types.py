"""Do the type hints serve a user: does mypy take right calls, and find the wrong ones?"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import nbnorm

# each `type: ignore` must be needed
EXAMPLE = """
from collections.abc import Mapping
from typing import Any

import numpy as np
import nbnorm
from nbnorm import LayerNorm, LayerNormGrads, LayerNormResult, layer_norm, layer_norm_backward

x = np.ones((4, 6, 8), np.float32)
y: np.ndarray[Any, Any] = layer_norm(x, 8)
result: LayerNormResult = layer_norm(x, (6, 8), eps=1e-6, use_diff_of_squares=True, return_stats=True)
mean = result.mean
layer_norm(x, [np.int64(8)], out=y, stream=None)
grads: LayerNormGrads = layer_norm_backward(y, x, 8, mean=None, rstd=None, output_mask=[True, False, False])
dx, dweight, dbias = grads
layer_norm_backward(y, x, 8, out=(None, np.ones(8, np.float32), None))

ln: LayerNorm = nbnorm.LayerNorm((6, 8), 1e-6, bias=False, device="cpu", dtype=np.float64)
state: Mapping[str, Any] = ln.state_dict()
ln.load_state_dict(state)
ln.load_state_dict(mapping=dict(state), prefix="")
ln.backward(ln(x), ln.forward(x)).dweight
shape: tuple[int, ...] = ln.normalized_shape
text: str = ln.extra_repr() + nbnorm.__version__

z: np.ndarray[Any, Any] = nbnorm.rms_norm(x, 8, eps=None)
dx_dweight: nbnorm.RMSNormGrads = nbnorm.rms_norm_backward(y, x, 8, output_mask=(True, False))
y, total = nbnorm.add_layer_norm(x, x, 8, total_out=None)
added: LayerNormGrads = nbnorm.add_layer_norm_backward(y, None, total, 8)
nbnorm.add_rms_norm(x, x, (6, 8), total_out=False, return_stats=True)
nbnorm.add_rms_norm_backward(y, x, total, 8).dweight
rms: nbnorm.RMSNorm = nbnorm.RMSNorm(8, 1e-6, dtype="float32")
rms.backward(rms(x), x).dx

nbnorm.rms_norm(x, 8, bias=None)  # type: ignore[call-arg]
nbnorm.add_layer_norm(x, 8)  # type: ignore[call-arg]
nbnorm.RMSNorm(8, bias=True)  # type: ignore[call-arg]
layer_norm(x, 8.0)  # type: ignore[arg-type]
layer_norm(x, "8")  # type: ignore[arg-type]
layer_norm(x)  # type: ignore[call-arg]
layer_norm(x, 8, epsilon=1e-6)  # type: ignore[call-arg]
layer_norm(x, 8, None, None, "small")  # type: ignore[arg-type]
layer_norm(x, 8, None, None, 1e-5, False, y)  # type: ignore[call-arg]
grads.dgamma  # type: ignore[attr-defined]
LayerNorm(8, gain=True)  # type: ignore[call-arg]
ln.load_state_dict([x])  # type: ignore[arg-type]
ln.load_state_dict(state, 1)  # type: ignore[arg-type]
ln.gain  # type: ignore[attr-defined]
"""


@pytest.fixture
def example(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(EXAMPLE)
    return file


def test_mypy_on_an_example(example, tmp_path, python_environment):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy: pip install '.[dev]'")
    # away from the package's own settings; what it imports is not the user's business
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path}"]
    environment = python_environment | {"MYPYPATH": str(Path(nbnorm.__file__).parent.parent)}
    if "site-packages" in environment["MYPYPATH"]:
        # where it is found by itself
        del environment["MYPYPATH"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, example], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_example_runs(example):
    """Up to its wrong calls."""
    right = example.read_text().partition("\nnbnorm.rms_norm(x, 8, bias")[0]
    exec(compile(right, str(example), "exec"), {})
