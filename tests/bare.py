"""Without OpenMP, for a user without a home, calls work and nothing is kept. `.ci/elsewhere` runs this in such a place."""

import importlib
import os
import pwd
import warnings

import numba
import numpy as np

import nbnorm
from nbnorm import reference
from nbnorm.cpu.workers import parallel
from nbnorm.disk import cache_folder

warnings.simplefilter("error")


def is_there(module):
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def main():
    assert not is_there("numba.np.ufunc.omppool")
    assert "HOME" not in os.environ
    try:
        print("the user is", pwd.getpwuid(os.geteuid()))
    except KeyError:
        print("nobody knows the user", os.geteuid())
    # beyond what one thread is given
    x = np.random.default_rng(0).standard_normal((800, 768), dtype=np.float32)
    y = nbnorm.layer_norm(x, 768)
    np.testing.assert_allclose(y, reference.layer_norm(x.astype(np.float64), 1)[0], atol=1e-5)
    assert numba.threading_layer() == "workqueue"
    assert parallel.many == parallel.OURS
    folder, distrust = cache_folder.place()
    assert distrust == "this user has no home folder", (folder, distrust)
    assert cache_folder.read("0" * 64 + ".nbnorm") == b""
    print("by threads of our own; nothing is kept:", distrust)


if __name__ == "__main__":
    main()
