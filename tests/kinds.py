"""Files of each kind that `nbnorm apply` knows, written and read by the libraries that people have for them."""

import importlib.util
import shutil

import numpy as np
import pytest

ENDINGS = {"npy": ".npy", "npz": ".npz", "safetensors": ".safetensors", "hdf5": ".h5", "zarr": ".zarr"}
PACKAGES = {"safetensors": "safetensors", "hdf5": "h5py", "zarr": "zarr"}


def param(kind, *others):
    """A parameter of a test, left out where the library of the kind is not there."""
    package = PACKAGES.get(kind)
    absent = package is not None and importlib.util.find_spec(package) is None
    return pytest.param(kind, *others, marks=pytest.mark.skipif(absent, reason=f"needs {package}"))


KINDS = [param(kind) for kind in ENDINGS]
WITH_NAMES = [param(kind) for kind in ENDINGS if kind != "npy"]


def save(kind, path, **arrays):
    """A file of these arrays; of one alone where the kind has no names."""
    if kind == "npy":
        (array,) = arrays.values()
        np.save(path, array)
    elif kind == "npz":
        np.savez(path, **arrays)
    elif kind == "safetensors":
        import safetensors.numpy

        # its version 0.8 writes the memory of other arrays as it lies
        safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    elif kind == "hdf5":
        import h5py

        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    else:
        import zarr

        shutil.rmtree(path, ignore_errors=True)
        group = zarr.open_group(path, mode="w")
        for name, array in arrays.items():
            chunks = tuple(max(1, size // 2) for size in array.shape)
            group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks)[...] = array


def load(kind, path, name="y"):
    """The array of this name."""
    if kind == "npy":
        return np.load(path)
    if kind == "npz":
        with np.load(path) as file:
            return file[name]
    if kind == "safetensors":
        import safetensors.numpy

        return safetensors.numpy.load_file(path)[name]
    if kind == "hdf5":
        import h5py

        with h5py.File(path) as file:
            return file[name][...]
    import zarr

    found = zarr.open(path, mode="r")
    return (found if isinstance(found, zarr.Array) else found[name])[...]
