"""The largest error of float32 layer norm, here and elsewhere, on rows that are hard to normalise, as a Markdown table.

In eps of (|y| + 1), against the reference in longdouble. Libraries that are not installed are left out.
"""

import contestants
import numpy as np

import nbnorm
from nbnorm import reference

ROWS, COLS = 64, 768


def cases():
    z = np.random.default_rng(0).standard_normal((ROWS, COLS))
    yield "standard normal", z
    for mean in ("1e3", "1e4", "1e6"):
        yield f"mean {mean}, deviation 1", z + float(mean)
    yield "one outlier of 1e4", np.where(np.arange(COLS) == 3, 1e4, z)
    yield "1e30 times a normal", 1e30 * z


def libraries():
    """Name, version and function of each library; nbnorm's version is that of the table."""
    yield "nbnorm", "", lambda x: nbnorm.layer_norm(x, x.shape[1])
    yield "nbnorm, difference of squares", "", lambda x: nbnorm.layer_norm(x, x.shape[1], use_diff_of_squares=True)
    yield "NumPy", "", lambda x: reference.layer_norm(x, 1)[0]
    peers = contestants.installed()
    if "torch" in peers:
        import torch

        version = torch.__version__.partition("+")[0]
        yield "torch", version, lambda x: torch.nn.functional.layer_norm(torch.from_numpy(x), x.shape[1:]).numpy()
    if "ONNX Runtime" in peers:
        import onnxruntime

        session = contestants.onnx_session(np.float32, threads=1)
        yield "ONNX Runtime", onnxruntime.__version__, lambda x: session.run(None, {"x": x, **unit_parameters(x)})[0]
    if "JAX" in peers:
        import jax

        yield "jax.nn.standardize", jax.__version__, lambda x: np.asarray(jax.nn.standardize(x, epsilon=contestants.EPS))


def unit_parameters(x):
    """ONNX's LayerNormalization has no form without a weight."""
    return {"w": np.ones(x.shape[1], x.dtype), "b": np.zeros(x.shape[1], x.dtype)}


def error(function, x):
    with np.errstate(over="ignore"):
        return float(reference.error_of_y(function(x), x.astype(np.longdouble), 1))


def main():
    names, versions, functions = zip(*libraries(), strict=True)
    print("| float32 rows |", " | ".join(" ".join(filter(None, pair)) for pair in zip(names, versions, strict=True)), "|")
    print("| --- |", " | ".join("---" for _ in names), "|")
    for name, values in cases():
        errors = [error(function, values.astype(np.float32)) for function in functions]
        print(f"| {name} |", " | ".join("NaN" if np.isnan(e) else f"{e:.2g}" for e in errors), "|")


if __name__ == "__main__":
    main()
