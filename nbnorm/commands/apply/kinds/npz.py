"""An array of a .npz file: a zip file of .npy files, which may be compressed."""

import math
import os
import shutil
import tempfile
import zipfile
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from nbnorm.commands.apply import elements, files
from nbnorm.commands.apply.kinds import Input, npy

PIECE_BYTES = 1 << 20
READABLE = "readable as a .npz file"


@contextmanager
def opened(path, name, scratch):
    """The array of this name, to be read from its beginning to its end, where zipfile compares the sum of its bytes.

    Rows in Fortran order are all over it: these are read from a copy in the folder `scratch`, which has no name there.
    """
    before = files.identity(Path(path).stat())
    with ExitStack() as stack:
        with files.library_errors(path, path, READABLE):
            archive = stack.enter_context(zipfile.ZipFile(path))
        members = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
        member = archive.getinfo(f"{files.chosen(path, name, list(dict.fromkeys(members)))}.npy")
        name = path if name is None else f"{path}:{name}"
        with files.library_errors(name, path, READABLE), archive.open(member) as file:
            head = file.read(npy.HEAD_BYTES)
        header = npy.header(name, head, member.file_size)
        offset, shape, dtype, fortran_order = header
        with files.library_errors(name, path, READABLE):
            file = stack.enter_context(archive.open(member))
            if fortran_order:
                copy = stack.enter_context(tempfile.TemporaryFile(dir=scratch, buffering=0))
                shutil.copyfileobj(file, copy, PIECE_BYTES)
                block = partial(elements.block, elements.Elements(path, copy, before, *header))
            else:
                file.read(offset)
                block = _from_its_beginning(name, path, file, before, shape, dtype)
        yield Input(name, shape, dtype, block, before, fortran_order, taken_as_bfloat16=dtype.name == "bfloat16")


def _from_its_beginning(name, path, file, before, shape, dtype):
    """A function that reads the next block of an open member, and what is behind the last: its sum is compared there."""
    left = dtype.itemsize * math.prod(shape)

    def block(bounds):
        nonlocal left
        block = np.empty([stop - start for start, stop in bounds], dtype)
        target = block.reshape(-1).view(np.uint8)
        left -= target.size
        try:
            with files.library_errors(name, path, READABLE):
                while target.size:
                    count = file.readinto(target)
                    if count == 0:
                        raise EOFError("it ends too early")
                    target = target[count:]
                while left == 0 and file.read(PIECE_BYTES):
                    pass
        finally:
            files.unchanged(path, before)
        return block

    return block


@contextmanager
def writer(temporary, destination, shape, dtype, _):
    """A function that writes the next block of the one array of a new file, which is not compressed, as by numpy.savez."""
    with temporary.open("r+b") as file:
        with (
            zipfile.ZipFile(file, "w") as archive,
            archive.open(zipfile.ZipInfo(f"{destination.name}.npy"), "w", force_zip64=True) as member,
        ):
            npy.begin(member, shape, dtype)
            yield lambda _, block: member.write(block.reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())
