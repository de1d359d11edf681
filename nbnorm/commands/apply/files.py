"""Every check of the names of files that `nbnorm apply` reads and writes, and what errors about files have in common.

A message begins with the file's name, and says what it is, what was expected, and what to do with another. What a file is,
`formats.py` finds out, and what may be wrong within one of a kind, its file in `kinds/`.
"""

import errno
import math
import os
import re
import stat
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from nbnorm.calls import arrays
from nbnorm.calls.options import MAX_NDIM

# how the names end of files that are written, and their kinds; any other is of a .npy file
# as of a file; a zip file has no room for more than 65,535 bytes
LONGEST_NAME = 255
ENDINGS = {".npy": "npy", ".npz": "npz", ".safetensors": "safetensors", ".zarr": "zarr", ".h5": "hdf5", ".hdf5": "hdf5"}
# an array in one of those that have several is FILE:NAME
WITH_NAMES = re.compile(r"\.(npy|npz|safetensors|zarr|h5|hdf5)(?=:)", re.IGNORECASE)
# endings of names that would say that the result is of another format than it is
OTHER_ENDINGS = re.compile(
    r"\.(gz|bz2|xz|zst|lz4|zip|tar|hdf|nc|mat|pth?|bin|ckpt|onnx|gguf|pkl|pickle|parquet|feather|arrow|csv|tsv|txt|json)$",
    re.IGNORECASE,
)
# what is in a folder of zarr, of its second version or its third
ZARR_MARKS = (".zarray", ".zgroup", "zarr.json")
# as numpy.save writes ml_dtypes.bfloat16, and what numpy.load makes of that
BFLOAT16 = {"<V2": "<", "|V2": "=", ">V2": ">"}


class Destination(NamedTuple):
    """A file to replace, or to make, of a kind, and what the array in it is named, if such a file has names."""

    path: Path
    kind: str
    name: str | None


def located(text):
    """The path of FILE or FILE:NAME, and NAME or None, each of which may have colons of its own."""
    text = os.fspath(text)
    places = [place for place, character in enumerate(text) if character == ":" and place > 0]
    for place in [] if os.path.lexists(text) else places:
        if os.path.lexists(text[:place]):
            return text[:place], text[place + 1 :]
    return text, None


def source(path):
    """Of what may be opened: a FIFO would wait for its other end."""
    if path == "-" and not Path(path).exists():
        raise ValueError("-: expected a file's name; stdin is not read")
    if not stat.S_ISREG(Path(path).stat().st_mode) and not is_zarr(path):
        raise ValueError(f"{path or repr(path)}: not a regular file; expected an array in a file, or in a folder of zarr")


def is_zarr(path):
    folder = Path(path)
    return folder.is_dir() and any((folder / name).exists() for name in ZARR_MARKS)


def destination(text, sources, name):
    """Where to write, which must be none of the files that are read; `name` is the array's where `text` has none."""
    text = os.fspath(text)
    if text == "-":
        raise ValueError("-: expected a name for a file; the result is not written to stdout")
    with_name = WITH_NAMES.search(text)
    if with_name:
        text, name = text[: with_name.end()], text[with_name.end() + 1 :]
        _name_of_array(text, name)
        if text.lower().endswith(".npy"):
            raise without_names(text, name)
    ending = OTHER_ENDINGS.search(text)
    if ending is not None:
        raise ValueError(f"{text}: ends in {ending[0]}; expected a name that ends in {', '.join(ENDINGS)}")
    if text.endswith(os.sep) or not text:
        raise ValueError(f"{text!r}: not a name for a file; expected one such as y.npy")
    kind = next((kind for ending, kind in ENDINGS.items() if text.lower().endswith(ending)), "npy")
    if kind == "zarr" and with_name is None:
        # the folder is the array itself then
        name = None
    # as the system follows it: what /dev/stdout leads to may have no name
    is_there = _is_regular_output(text, kind)
    path = Path(os.path.realpath(text))
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such directory as {path.parent}")
    if path.is_symlink():
        raise ValueError(f"{path}: a symbolic link that leads back to itself; expected a name for a file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: no permission to write in {path.parent}")
    for source in sources:
        # one that is missing is complained of when it is opened
        if is_there and Path(source).exists() and Path(source).samefile(path):
            raise ValueError(f"{path}: is also an input; expected another file to write to")
    return Destination(path, kind, name)


def different(destinations):
    """The same, where no two are one file."""
    paths = [destination.path for destination in destinations]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{paths[0]}: is to have y and the total; expected a file for each")
    return destinations


def without_names(path, name):
    return ValueError(f"{path}:{name}: a .npy file has one array, without a name; expected {path}")


def _name_of_array(text, name):
    """Of one that is to be written: no way out of the file, and nothing that its format keeps for itself."""
    parts = name.split("/")
    if {"", ".", ".."}.intersection(parts) or not name.isprintable() or name.startswith("__"):
        raise ValueError(f"{text}:{name}: not a name for an array; expected one such as y or layer/y")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ValueError(
            f"{text}: a name of {len(name)} characters for an array; expected one of at most {LONGEST_NAME} bytes"
        )


def _is_regular_output(name, kind):
    """Whether there is such a file already."""
    try:
        status = Path(name).stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
    if kind == "zarr":
        raise ValueError(f"{name}: is there already; expected a new name, as a folder is not replaced")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}: not a regular file; expected a name for a new file, or a file to replace")
    for number, stream in ((1, "stdout"), (2, "stderr")):
        try:
            is_stream = os.path.samestat(status, os.fstat(number))
        except OSError:
            continue
        if is_stream:
            raise ValueError(f"{name}: is where {stream} goes; expected another file, as messages are printed there")
    return True


def chosen(path, name, names):
    """Which of the arrays in a file is meant, by its name, or as the only one."""
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return name
    if not names:
        raise ValueError(f"{path}: has no array")
    # those within a group of this name come first
    some = sorted(names, key=lambda other: (not other.startswith(f"{name}/"), other))[:5]
    has = f"has {', '.join(map(short, some))}" + (f" and {len(names) - len(some)} more" if len(names) > len(some) else "")
    wanted = f"{path}: {len(names)} arrays" if name is None else f"{path}:{name}: no such array"
    raise ValueError(f"{wanted}; the file {has}: expected one by its name, as in {path}:{some[0]}")


def number_dtype(name, dtype):
    """The dtype of a file's elements, bfloat16 for two bytes without a name; refused where it is none of numbers."""
    descr = dtype if isinstance(dtype, str) else dtype.str
    if descr in BFLOAT16 and getattr(dtype, "fields", None) is None:
        return bfloat16(name, descr, BFLOAT16[descr], "which is taken as bfloat16 and needs")
    # pickles, and numbers in structures or arrays of their own
    if dtype.kind in "OV":
        raise TypeError(f"{name}: elements of dtype {dtype!s:.200}; expected floats, integers or booleans")
    return dtype


def bfloat16(name, descr, order, which="which needs"):
    try:
        return arrays.bfloat16().newbyteorder(order)
    except ModuleNotFoundError as error:
        fault = f"{name}: elements of dtype {descr}, {which} the package ml_dtypes"
        raise TypeError(f"{fault}: pip install ml_dtypes") from error


def possible_shape(shape, dtype, broken):
    """Of an array; `broken` makes an error of what is wrong with the one that a header says."""
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        raise broken(f"shape {short(shape)} in its header; expected a tuple of ints such as (3, 768)")
    is_possible = min(shape, default=0) >= 0 and len(shape) <= MAX_NDIM
    if not is_possible or math.prod(max(1, size) for size in shape) * max(1, dtype.itemsize) > sys.maxsize:
        raise broken(f"shape {short(shape)} in its header; expected one that an array can have")


def identity(status):
    """What changes where another file takes the name, or this one is written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def unchanged(path, before):
    if identity(Path(path).stat()) != before:
        raise changed(path)


def changed(path):
    return ValueError(f"{path}: changed while it was read")


@contextmanager
def system_errors(path, temporary=None):
    """Errors say which file they are about: those of the system in reading or writing an open one do not.

    What is written to a temporary file is the file's that it will become.
    """
    try:
        yield
    except OSError as error:
        is_temporary = temporary is not None and str(error.filename).startswith(os.fspath(temporary))
        if error.filename is None or is_temporary:
            error.filename = os.fspath(path)
        raise


@contextmanager
def library_errors(name, path, what):
    """Errors of a library for files, which may be of any type, in one line: that the file is not, say, readable as zarr."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number:
            # without what the library says of addresses and descriptors
            raise OSError(number, os.strerror(number), *([] if path is None else [os.fspath(path)])) from error
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: not {what}: {words:.200}") from error


def needs(name, package, what):
    """The error where the library for a kind of files is not there."""
    return TypeError(f"{name}: {what}, which needs the package {package}: pip install 'nbnorm[files]'")


def short(value, characters=100):
    try:
        shown = repr(value)
    except ValueError:
        # as Python says of an int of thousands of digits
        return "of numbers too long to show"
    return shown if len(shown) <= characters else f"{shown[:characters]}..."


@contextmanager
def named(names):
    """Errors about an argument say what the command line knows it as: the file, or the option."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if colon and name in names:
            rest = rest.replace("normalized_shape", names["normalized_shape"])
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{names[name]}:{rest}") from error
        raise
