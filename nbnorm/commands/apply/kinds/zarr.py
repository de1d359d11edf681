"""An array of a folder of zarr, by its library, in the second version of the format or the third."""

import os
import warnings
from contextlib import contextmanager
from pathlib import Path

from nbnorm.commands.apply import files
from nbnorm.commands.apply.kinds import Input

READABLE = "readable as zarr"


@contextmanager
def opened(path, name, _):
    """The array of the folder, or of this name in its group."""
    zarr = _library(path)
    with files.library_errors(path, path, READABLE), warnings.catch_warnings():
        # which zarr gives for each file in the folder that is none of its own
        warnings.simplefilter("ignore")
        # a path, since a text may be an address too
        found = zarr.open(Path(path), mode="r")
        names = [None] if isinstance(found, zarr.Array) else _names(zarr, found, name)
    if names == [None] and name is not None:
        raise ValueError(f"{path}:{name}: {path} is an array itself; expected {path}")
    chosen = None if names == [None] else files.chosen(path, name, names)
    name = path if name is None else f"{path}:{name}"
    with files.library_errors(name, path, READABLE):
        array = found if chosen is None else found[chosen]
        marks = [Path(path) / array.path / mark for mark in files.ZARR_MARKS]
    numbers = files.number_dtype(name, array.dtype)
    _unpickles_nothing(name, array)
    mark = next((mark for mark in marks if mark.exists()), marks[-1])
    before = files.identity(mark.stat())

    def block(bounds):
        try:
            with files.library_errors(name, path, READABLE):
                return array[tuple(slice(*bound) for bound in bounds)].view(numbers)
        finally:
            files.unchanged(mark, before)

    is_taken = numbers.name == "bfloat16"
    yield Input(name, array.shape, numbers, block, before, chunks=array.chunks, taken_as_bfloat16=is_taken)


def _library(path):
    try:
        import zarr
    except ModuleNotFoundError as error:
        raise files.needs(path, "zarr", "a folder of zarr") from error
    return zarr


def _names(zarr, group, name):
    if name is not None and name in group and isinstance(group[name], zarr.Array):
        return [name]
    return [path for path, member in group.members(max_depth=None) if isinstance(member, zarr.Array)]


def _unpickles_nothing(name, array):
    """The second version's filters, which a file names itself, have one that unpickles: it can run any code."""
    metadata = array.metadata.to_dict()
    used = [metadata.get("compressor"), *(metadata.get("filters") or ()), *(metadata.get("codecs") or ())]
    if any("pickle" in str(codec).lower() for codec in used):
        raise ValueError(f"{name}: its elements are pickled; expected numbers, as pickles can run code")


@contextmanager
def writer(temporary, destination, shape, dtype, chunks):
    """A function that writes a block to an array in a new folder: at its root, or of this name in a group."""
    zarr = _library(destination.path)
    if dtype.name == "bfloat16":
        raise TypeError(f"{destination.path}: zarr has no bfloat16; expected another --dtype, or another kind of file")
    chunks = tuple(max(1, size) for size in chunks)
    array = zarr.create_array(temporary, name=destination.name, shape=shape, chunks=chunks, dtype=dtype)

    def write(index, block):
        # an int would take its axis away
        array[tuple(slice(i, i + 1) if isinstance(i, int) else i for i in index)] = block

    yield write
    for folder, _, names in os.walk(temporary):
        for file_name in names:
            with (Path(folder) / file_name).open("r+b") as file:
                os.fsync(file.fileno())
