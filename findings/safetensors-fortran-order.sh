#!/usr/bin/env bash
# safetensors 0.8.0, NumPy 2.4.6: an array in Fortran order, as `x.T` is, is saved as its memory lies. What is loaded has its shape and
# dtype and other values, without a word, through `save` and through `save_file`. 0.7.0 gives back what was saved.
#
# Guess: the values that were saved come back, whatever their order in memory, since a file has a shape and C order alone.
# Seen: 0.8.0 hands the array's address and its number of bytes to the part in Rust, and asks for no order. It turns the bytes of a
# big-endian array round first, so that one comes back right. (safetensors' issue 825; its pull requests 826 and 829 mend it.)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"

cat > "$folder/order.py" <<'PYTHON'
import sys

import numpy as np
import safetensors.numpy
from safetensors import __version__

x = np.arange(12, dtype=np.float32).reshape(3, 4)
arrays = {"C": x, "big-endian": x.astype(">f4"), "Fortran": np.asfortranarray(x), "transposed": x.T}
lies = {"Fortran": x.ravel("F").reshape(3, 4), "transposed": x.reshape(4, 3)}
for name, array in arrays.items():
    path = f"{sys.argv[1]}/{name}.safetensors"
    safetensors.numpy.save_file({"x": array}, path)
    in_memory = safetensors.numpy.load(safetensors.numpy.save({"x": array}))["x"]
    for loaded in (safetensors.numpy.load_file(path)["x"], in_memory):
        assert loaded.shape == array.shape
        assert loaded.dtype == np.float32
        is_right = bool((loaded == array).all())
        is_as_it_lies = name in lies and bool((loaded == lies[name]).all())
        print(__version__, name, "right" if is_right else "as it lies" if is_as_it_lies else "else")
        expected = (False, True) if __version__ == "0.8.0" and name in lies else (True, False)
        assert (is_right, is_as_it_lies) == expected, f"seen before: {expected}"
PYTHON
for version in 0.7.0 0.8.0; do
    "$folder/venv/bin/python" -m pip install --quiet "safetensors==$version" numpy==2.4.6
    "$folder/venv/bin/python" "$folder/order.py" "$folder"
done
