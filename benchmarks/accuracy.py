"""The largest error of float32 layer norm, here and elsewhere, on rows that are hard to normalise, as a Markdown table.

In eps of (|y| + 1), against the reference in longdouble. Libraries that are not installed are left out.
"""

import importlib.util

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
    yield "nbnorm", lambda x: nbnorm.layer_norm(x, COLS)
    yield "nbnorm, difference of squares", lambda x: nbnorm.layer_norm(x, COLS, use_diff_of_squares=True)
    yield "NumPy", lambda x: reference.layer_norm(x, 1)[0]
    if importlib.util.find_spec("torch"):
        import torch

        version = torch.__version__.partition("+")[0]
        yield f"torch {version}", lambda x: torch.nn.functional.layer_norm(torch.from_numpy(x), (COLS,)).numpy()
    if importlib.util.find_spec("jax"):
        import jax

        yield f"jax.nn.standardize {jax.__version__}", lambda x: jax.nn.standardize(x, epsilon=1e-5)


def main():
    functions = dict(libraries())
    print("| float32 rows |", " | ".join(functions), "|")
    print("| --- |", " | ".join("---" for _ in functions), "|")
    for name, values in cases():
        x = values.astype(np.float32)
        with np.errstate(over="ignore"):
            errors = [float(reference.error_of_y(np.asarray(f(x)), x.astype(np.longdouble), 1)) for f in functions.values()]
        print(f"| {name} |", " | ".join("NaN" if np.isnan(e) else f"{e:.2g}" for e in errors), "|")


if __name__ == "__main__":
    main()
