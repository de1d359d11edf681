"""The files that `nbnorm apply` writes, each of the kind that its name says: complete, or as they were before."""

import os
import shutil
import stat
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nbnorm.commands.apply import files
from nbnorm.commands.apply.kinds import hdf5, npy, npz, safetensors, zarr

WRITERS = {"npy": npy.writer, "npz": npz.writer, "safetensors": safetensors.writer, "hdf5": hdf5.writer, "zarr": zarr.writer}


@contextmanager
def created(destinations, shape, dtype, chunks):
    """For each destination a function of an index and a block, for blocks of the shape `chunks` in C order.

    The files take their names together when all are complete, or are removed where anything is raised.
    """
    with ExitStack() as stack:
        temporaries = [stack.enter_context(_temporary(destination)) for destination in destinations]
        with ExitStack() as writers:
            yield [
                writers.enter_context(_writer(destination, temporary, shape, dtype, chunks))
                for destination, temporary in zip(destinations, temporaries, strict=True)
            ]
        for destination, temporary in zip(destinations, temporaries, strict=True):
            temporary.chmod(_mode(destination))
            temporary.replace(destination.path)


@contextmanager
def _temporary(destination):
    """A new file, or a folder of zarr, beside it."""
    names = {"prefix": ".nbnorm-", "suffix": ".part", "dir": destination.path.parent}
    if destination.kind == "zarr":
        path = Path(tempfile.mkdtemp(**names))
    else:
        descriptor, name = tempfile.mkstemp(**names)
        os.close(descriptor)
        path = Path(name)
    try:
        yield path
    except BaseException:
        if destination.kind == "zarr":
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _writer(destination, temporary, shape, dtype, chunks):
    def write(index, block):
        # of two files, each has its own errors
        with files.system_errors(destination.path, temporary):
            put(index, block)

    with (
        files.system_errors(destination.path, temporary),
        WRITERS[destination.kind](temporary, destination, shape, dtype, chunks) as put,
    ):
        yield write


def _mode(destination):
    """The permissions of the file that is replaced, or those of a new one."""
    if destination.path.exists():
        return stat.S_IMODE(destination.path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return (0o777 if destination.kind == "zarr" else 0o666) & ~umask
