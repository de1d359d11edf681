"""The .npy format: what its header says, every check of that, and one to write."""

import ast
import math
import os
import re
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from nbnorm.commands.apply import elements, files
from nbnorm.commands.apply.kinds import Input

# as NumPy allows; what is longer takes long to parse
HEADER_CHARACTERS = 10_000
# all that is looked at: a header can say that it has 4 GB
HEAD_BYTES = HEADER_CHARACTERS + 100
MAGIC = b"\x93NUMPY"
# bytes of the number that says how long the header is
LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
KEYS = {"descr", "fortran_order", "shape"}


@contextmanager
def opened(path, name, _):
    """The array of the file."""
    if name is not None:
        raise files.without_names(path, name)
    # not buffered, as what is read at once is large or far from the rest
    with Path(path).open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        with files.system_errors(path):
            head = file.read(HEAD_BYTES)
        array = elements.Elements(path, file, files.identity(status), *header(path, head, status.st_size))
        is_taken = array.dtype.name == "bfloat16"
        block = partial(elements.block, array)
        yield Input(path, array.shape, array.dtype, block, array.identity, array.fortran_order, taken_as_bfloat16=is_taken)


def writer(temporary, _, shape, dtype, __):
    """A function that writes the next block of the array of a new file."""
    return elements.writer(temporary, partial(begin, shape=shape, dtype=dtype))


def begin(file, shape, dtype):
    """Write what comes before the elements."""
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})


def header(path, head, size):
    """What the `head` of a file of so many bytes says: where elements begin, their shape and dtype, if in Fortran order."""
    version = tuple(head[6:8])
    if head[:6] != MAGIC or version not in LENGTH_BYTES:
        raise _broken(path, f"version {'.'.join(map(str, version)) or 'missing'}; expected 1.0, 2.0 or 3.0")
    start = 8 + LENGTH_BYTES[version]
    length = int.from_bytes(head[8:start], "little")
    if length > HEADER_CHARACTERS:
        raise _broken(path, f"a header of {length} bytes; expected at most {HEADER_CHARACTERS}")
    offset = start + length
    if len(head) < offset:
        raise _broken(path, f"it ends within its header, after {len(head)} of {offset} bytes")
    text = head[start:offset].decode("utf-8" if version == (3, 0) else "latin-1", "replace")
    parsed = _parsed(path, text)
    fortran_order = parsed["fortran_order"]
    if type(fortran_order) is not bool:
        raise _broken(path, f"fortran_order {files.short(fortran_order)} in its header; expected True or False")
    dtype = _dtype(path, parsed["descr"])
    shape = parsed["shape"]
    files.possible_shape(shape, dtype, partial(_broken, path))
    expected = offset + math.prod(shape) * dtype.itemsize
    if size < expected:
        raise ValueError(f"{path}: {size} bytes; expected {expected}, for the shape and dtype that its header says")
    return offset, shape, dtype, fortran_order


def _parsed(path, text):
    """The header's dict."""
    try:
        header = _literal(text)
    # a hostile one may raise anything in there
    except Exception as error:
        example = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 768)}"
        fault = f"the header {files.short(text.strip())}; expected one such as {example}"
        raise _broken(path, fault) from error
    if not isinstance(header, dict) or set(header) != KEYS:
        came = sorted(map(str, header)) if isinstance(header, dict) else type(header).__name__
        raise _broken(path, f"a header of {files.short(came)}; expected a dict of descr, fortran_order and shape")
    return header


def _literal(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.literal_eval(text)
        except SyntaxError:
            # what Python 2 wrote has sizes such as 3L
            return ast.literal_eval(re.sub(r"(?<=[0-9])L\b", "", text))


def _dtype(path, descr):
    if isinstance(descr, str) and descr in files.BFLOAT16:
        return files.number_dtype(path, descr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = np.lib.format.descr_to_dtype(descr)
    except Exception as error:
        raise _broken(path, f"descr {files.short(descr)} in its header; expected a dtype such as '<f4'") from error
    return files.number_dtype(path, dtype)


def _broken(path, fault):
    return ValueError(f"{path}: not an array in NumPy's .npy format: {fault}")
