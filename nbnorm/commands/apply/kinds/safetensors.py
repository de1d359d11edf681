"""The safetensors format: what its header says, every check of that, and one to write.

Its own library maps files into memory, where one that is cut kills the process, and writes an array all at once. A file is
the length of its header in eight bytes, the header, which is JSON, and the elements.
"""

import json
import math
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from nbnorm.commands.apply import elements, files
from nbnorm.commands.apply.kinds import Input

# of some 150,000 arrays; the format allows 100 MB, which would take a gigabyte as Python's objects
HEADER_BYTES = 1 << 24
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXAMPLE = {"dtype": "F32", "shape": [3, 768], "data_offsets": [0, 9216]}


@contextmanager
def opened(path, name, _):
    """The array of this name."""
    with Path(path).open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        with files.system_errors(path):
            header, start = _header(path, file, status.st_size)
        chosen = files.chosen(path, name, list(header))
        name = path if name is None else f"{path}:{name}"
        offset, shape, dtype = _entry(name, header[chosen], status.st_size - start)
        array = elements.Elements(path, file, files.identity(status), start + offset, shape, dtype)
        yield Input(name, shape, dtype, partial(elements.block, array), array.identity)


def _header(path, file, size):
    """The arrays that an open file of so many bytes says it has, and where their bytes begin."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(HEADER_BYTES, size - 8):
        raise _broken(path, f"a header of {length} bytes; expected at most {HEADER_BYTES}, in a file of {size}")
    text = bytearray()
    while len(text) < length and (part := file.read(length - len(text))):
        text += part
    try:
        header = json.loads(text)
    # one that is nested deeply, or no text, raises others
    except Exception as error:
        raise _broken(path, f"the header {files.short(bytes(text[:200]))}; expected JSON") from error
    if not isinstance(header, dict):
        raise _broken(path, f"a header of {type(header).__name__!r}; expected a dict of arrays")
    header.pop("__metadata__", None)
    return header, 8 + length


def _entry(name, entry, room):
    """Where the array of an entry of such a header begins, its shape and dtype; behind the header are `room` bytes."""
    if not isinstance(entry, dict) or not entry.keys() >= EXAMPLE.keys():
        raise _broken(name, f"the entry {files.short(entry)}; expected one such as {EXAMPLE}")
    if entry["dtype"] not in list(DTYPES):
        raise TypeError(f"{name}: dtype {files.short(entry['dtype'])}; supported in a safetensors file: {', '.join(DTYPES)}")
    is_bfloat16 = entry["dtype"] == "BF16"
    dtype = files.bfloat16(name, "BF16", "<") if is_bfloat16 else np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<")
    shape, offsets = (tuple(v) if isinstance(v := entry[key], list) else v for key in ("shape", "data_offsets"))
    files.possible_shape(shape, dtype, partial(_broken, name))
    is_range = isinstance(offsets, tuple) and len(offsets) == 2 and all(type(place) is int for place in offsets)
    if not is_range or not 0 <= offsets[0] <= offsets[1] <= room:
        raise _broken(name, f"data_offsets {files.short(offsets)}; expected a range of the {room} bytes behind the header")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise _broken(name, f"{offsets[1] - offsets[0]} bytes; expected {expected}, for the shape and dtype of its header")
    return offsets[0], shape, dtype


def _broken(name, fault):
    return ValueError(f"{name}: not an array in a safetensors file: {fault}")


def writer(temporary, destination, shape, dtype, _):
    """A function that writes the next block of the one array of a new file."""
    (code,) = (code for code, known in DTYPES.items() if known == dtype.name)
    length = math.prod(shape) * dtype.itemsize
    header = json.dumps({destination.name: {"dtype": code, "shape": shape, "data_offsets": [0, length]}}).encode()
    # so that elements are aligned, as the library has it
    header += b" " * (-len(header) % 8)
    return elements.writer(temporary, lambda file: file.write(len(header).to_bytes(8, "little") + header))
