"""The arrays that `nbnorm apply` reads, each in a file of any kind."""

from contextlib import contextmanager

from nbnorm.commands import files, formats
from nbnorm.commands.kinds import hdf5, npy, npz, safetensors, zarr

OPENED = {"npy": npy.opened, "npz": npz.opened, "safetensors": safetensors.opened, "hdf5": hdf5.opened, "zarr": zarr.opened}


@contextmanager
def opened(text, scratch):
    """The array of FILE or FILE:NAME. A file without a name may be made in the folder `scratch`."""
    path, name = files.located(text)
    files.source(path)
    with OPENED[formats.kind(path)](path, name, scratch) as array:
        yield array
