"""A dataset of an HDF5 file, by h5py."""

import io
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nbnorm.commands.apply import elements, files
from nbnorm.commands.apply.kinds import Input

READABLE = "readable as an HDF5 file"
WRITABLE = "writable as an HDF5 file"


@contextmanager
def opened(path, name, _):
    """The dataset of this name, with slashes where it is in groups."""
    h5py = _library(path)
    before = files.identity(Path(path).stat())
    with files.library_errors(path, path, READABLE):
        file = h5py.File(path, "r")
    with file:
        with files.library_errors(path, path, READABLE):
            names = [name] if _has_dataset(h5py, file, name) else _names(h5py, file)
        chosen = files.chosen(path, name, names)
        name = path if name is None else f"{path}:{name}"
        with files.library_errors(name, path, READABLE):
            dataset = file[chosen]
            shape, dtype, chunks = dataset.shape, dataset.dtype, dataset.chunks
            sources = [source.file_name for source in dataset.virtual_sources()] if dataset.is_virtual else []
        if shape is None:
            raise ValueError(f"{name}: an empty dataset, without a shape; expected an array")
        numbers = files.number_dtype(name, dtype)
        _are_there(name, path, sources)

        def block(bounds):
            try:
                with files.library_errors(name, path, READABLE):
                    return dataset[tuple(slice(*bound) for bound in bounds)].view(numbers)
            finally:
                files.unchanged(path, before)

        yield Input(name, shape, numbers, block, before, chunks=chunks, taken_as_bfloat16=numbers.name == "bfloat16")


def _library(path):
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise files.needs(path, "h5py", "an HDF5 file") from error
    return h5py


def _has_dataset(h5py, file, name):
    return name is not None and name in file and isinstance(file[name], h5py.Dataset)


def _names(h5py, file):
    found = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found


def _are_there(name, path, sources):
    """The files that a virtual dataset is put together of: HDF5 gives zeros for one that is missing."""
    for source in sources:
        # a % stands for a number, as of a series of files that may end
        if source != "." and "%" not in source and not (Path(path).parent / source).exists():
            raise ValueError(f"{name}: a virtual dataset whose file {source} is not there; expected it beside {path}")


def writer(temporary, destination, shape, dtype, _):
    """A function that writes the next block of the one dataset of a new file.

    h5py says what is in the file beside the elements, and writes neither: a disk that is full as it closes a file leaves it
    with one that ends the process when it is closed again.
    """
    h5py = _library(destination.path)
    pieces = _Pieces()
    with files.library_errors(destination.path, None, WRITABLE), h5py.File(pieces, "w") as made:
        options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        options.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        groups = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        groups.set_create_intermediate_group(True)
        groups.set_char_encoding(h5py.h5t.CSET_UTF8)
        space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype.str), logical=True)
        dataset = h5py.h5d.create(made.id, destination.name.encode(), kind, space, options, groups)
        # which an array without elements has none of
        offset = dataset.get_offset() or 0
    return elements.writer(temporary, lambda file: pieces.write_to(file, offset))


class _Pieces(io.RawIOBase):
    """A file in memory that keeps what is written to it, and nothing for what lies between."""

    def __init__(self):
        self.pieces = []
        self.place = self.size = 0

    def seek(self, offset, whence=os.SEEK_SET):
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def tell(self):
        return self.place

    def truncate(self, size=None):
        self.size = self.place if size is None else size
        return self.size

    def write(self, data):
        self.pieces.append((self.place, bytes(data)))
        self.place += len(data)
        self.size = max(self.size, self.place)
        return len(data)

    def write_to(self, file, place):
        """Write all of them to a real file, and go to this place in it."""
        for start, data in self.pieces:
            file.seek(start)
            file.write(data)
        file.seek(place)
