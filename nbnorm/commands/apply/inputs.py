"""The arrays that `nbnorm apply` reads, each in a file of any kind."""

from contextlib import contextmanager

from nbnorm.commands.apply import files, formats
from nbnorm.commands.apply.kinds import hdf5, npy, npz, safetensors, zarr

OPENED = {"npy": npy.opened, "npz": npz.opened, "safetensors": safetensors.opened, "hdf5": hdf5.opened, "zarr": zarr.opened}


@contextmanager
def opened(text, scratch=None):
    """The array of FILE or FILE:NAME. A file without a name may be made in the folder `scratch`.

    Without such a folder, the array is one whose blocks can be read in any order.
    """
    path, name = files.located(text)
    files.source(path)
    kind = formats.kind(path)
    if kind == "npz" and scratch is None:
        fault = f"{path}: a .npz file, which is read from its beginning to its end by one process"
        raise ValueError(f"{fault}; expected .npy, safetensors, HDF5 or zarr, or no --scheduler")
    with OPENED[kind](path, name, scratch) as array:
        yield array
