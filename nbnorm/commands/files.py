"""Every check of the files that `nbnorm apply` reads and writes, and every error about one.

A message begins with the file's name, and says what it is, what was expected, and what to do with a file of another format.
"""

import ast
import codecs
import errno
import math
import os
import re
import stat
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nbnorm.calls import arrays
from nbnorm.calls.checks import MAX_NDIM

# as NumPy allows; what is longer takes long to parse
NPY_HEADER_CHARACTERS = 10_000
NPY_MAGIC = b"\x93NUMPY"
# bytes of the number that says how long the header is
NPY_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
NPY_KEYS = {"descr", "fortran_order", "shape"}
# as numpy.save writes ml_dtypes.bfloat16, and what numpy.load makes of that
NPY_BFLOAT16 = {"<V2": "<", "|V2": "=", ">V2": ">"}

SAVE = 'np.save("x.npy", {})'
# how files of other formats begin, the more special first, what they are, and how to get a .npy file out of them
FORMATS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", SAVE.format('h5py.File("{name}")["NAME"][()]')),
    (b"CDF", "a NetCDF file", SAVE.format('xarray.open_dataset("{name}")["NAME"].values')),
    (b"MATLAB 7.3", "a MATLAB file in HDF5", SAVE.format('h5py.File("{name}")["NAME"][()].T')),
    (b"MATLAB ", "a MATLAB file", SAVE.format('scipy.io.loadmat("{name}")["NAME"]')),
    (b"\x1f\x8b", "compressed by gzip", 'decompress it first: gunzip -c "{name}" > x.npy'),
    (b"BZh", "compressed by bzip2", 'decompress it first: bunzip2 -c "{name}" > x.npy'),
    (b"\xfd7zXZ\x00", "compressed by xz", 'decompress it first: unxz -c "{name}" > x.npy'),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", 'decompress it first: unzstd -c "{name}" > x.npy'),
    (b"\x04\x22\x4d\x18", "compressed by lz4", 'decompress it first: unlz4 -c "{name}" > x.npy'),
    (b"GGUF", "a GGUF file", "read a tensor with gguf.GGUFReader, and np.save it"),
    (b"PAR1", "a Parquet file", SAVE.format('pandas.read_parquet("{name}").to_numpy()')),
    (b"ARROW1", "an Arrow file", SAVE.format('pandas.read_feather("{name}").to_numpy()')),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "a file of torch.save", SAVE.format('torch.load("{name}")["NAME"].numpy()')),
    (b"version https://git-lfs", "Git LFS's stand-in for a file", "fetch the file itself: git lfs pull"),
    *((b"\x80" + bytes([protocol]), "a pickle", "pickles are not loaded, as they can run code") for protocol in range(2, 6)),
)
NPZ = "a .npz file", SAVE.format('np.load("{name}")["NAME"]')
TORCH = "a file of torch.save", SAVE.format('torch.load("{name}")["NAME"].numpy()')
ZIP = "a zip file", "unpack it first"
SAFETENSORS = "a safetensors file", SAVE.format('safetensors.numpy.load_file("{name}")["NAME"]')
ZARR = "a zarr folder", SAVE.format('zarr.open("{name}", mode="r")[...]')
# endings of names that would say that the result is of another format than it is
OTHER_ENDINGS = re.compile(
    r"\.(npz|gz|bz2|xz|zst|lz4|zip|tar|safetensors|hdf5?|h5|nc|mat|zarr|pth?|bin|ckpt|onnx|gguf|pkl|pickle|parquet|feather|arrow"
    r"|csv|tsv|txt|json)$",
    re.IGNORECASE,
)


def destination(path, sources):
    """The file to replace, or to make, which must be none of those that are read."""
    name = os.fspath(path)
    if name == "-":
        raise ValueError("-: expected a name for a file; the result is not written to stdout")
    ending = OTHER_ENDINGS.search(name)
    if ending is not None:
        raise ValueError(f"{name}: ends in {ending[0]}; expected a name that ends in .npy, as the result is of that format")
    if name.endswith(os.sep) or not name:
        raise ValueError(f"{name!r}: not a name for a file; expected one such as y.npy")
    # as the system follows it: what /dev/stdout leads to may have no name
    is_there = _is_regular_output(name)
    result = Path(os.path.realpath(name))
    if not result.parent.is_dir():
        raise ValueError(f"{result}: no such directory as {result.parent}")
    if result.is_symlink():
        raise ValueError(f"{result}: a symbolic link that leads back to itself; expected a name for a file")
    if not os.access(result.parent, os.W_OK):
        raise ValueError(f"{result}: no permission to write in {result.parent}")
    for source in sources:
        # one that is missing is complained of when it is opened
        if is_there and Path(source).exists() and Path(source).samefile(result):
            raise ValueError(f"{result}: is also an input; expected another file to write to")
    return result


def _is_regular_output(name):
    """Whether there is such a file already."""
    try:
        status = Path(name).stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
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


def source(path):
    """Of what may be opened: a FIFO would wait for its other end."""
    folder = Path(path)
    if os.fspath(path) == "-" and not folder.exists():
        raise ValueError("-: expected a file's name; stdin is not read")
    mode = folder.stat().st_mode
    if stat.S_ISDIR(mode) and any((folder / name).exists() for name in (".zarray", ".zgroup", "zarr.json")):
        raise _other_format(path, *ZARR)
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path or repr(path)}: not a regular file; expected an array in NumPy's .npy format")


def npy_header(path, file):
    """What the header of an open .npy file says: where the elements begin, the shape, the dtype, and if in Fortran order."""
    # all that is looked at: a header can say that it has 4 GB
    head = file.read(NPY_HEADER_CHARACTERS + 100)
    if head[: len(NPY_MAGIC)] != NPY_MAGIC:
        raise _other_format(path, *_format(head))
    version = tuple(head[6:8])
    if version not in NPY_LENGTH_BYTES:
        raise _broken(path, f"version {'.'.join(map(str, version)) or 'missing'}; expected 1.0, 2.0 or 3.0")
    start = 8 + NPY_LENGTH_BYTES[version]
    length = int.from_bytes(head[8:start], "little")
    if length > NPY_HEADER_CHARACTERS:
        raise _broken(path, f"a header of {length} bytes; expected at most {NPY_HEADER_CHARACTERS}")
    offset = start + length
    if len(head) < offset:
        raise _broken(path, f"it ends within its header, after {len(head)} of {offset} bytes")
    text = head[start:offset].decode("utf-8" if version == (3, 0) else "latin-1", "replace")
    header = _parsed(path, text)
    fortran_order = header["fortran_order"]
    if type(fortran_order) is not bool:
        raise _broken(path, f"fortran_order {_short(fortran_order)} in its header; expected True or False")
    dtype = _dtype(path, header["descr"])
    shape = header["shape"]
    _shape(path, shape, dtype)
    expected = offset + math.prod(shape) * dtype.itemsize
    size = os.fstat(file.fileno()).st_size
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
        fault = f"the header {_short(text.strip())}; expected one such as {example}"
        raise _broken(path, fault) from error
    if not isinstance(header, dict) or set(header) != NPY_KEYS:
        came = sorted(map(str, header)) if isinstance(header, dict) else type(header).__name__
        raise _broken(path, f"a header of {_short(came)}; expected a dict of descr, fortran_order and shape")
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
    if isinstance(descr, str) and descr in NPY_BFLOAT16:
        try:
            return arrays.bfloat16().newbyteorder(NPY_BFLOAT16[descr])
        except ModuleNotFoundError as error:
            fault = f"{path}: elements of dtype {descr}, which is taken as bfloat16 and needs the package ml_dtypes"
            raise TypeError(f"{fault}: pip install ml_dtypes") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = np.lib.format.descr_to_dtype(descr)
    except Exception as error:
        raise _broken(path, f"descr {_short(descr)} in its header; expected a dtype such as '<f4'") from error
    # pickles, and numbers in structures or arrays of their own
    if dtype.kind in "OV":
        raise TypeError(f"{path}: elements of dtype {dtype!s:.200}; expected floats, integers or booleans")
    return dtype


def _shape(path, shape, dtype):
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        raise _broken(path, f"shape {_short(shape)} in its header; expected a tuple of ints such as (3, 768)")
    is_possible = min(shape, default=0) >= 0 and len(shape) <= MAX_NDIM
    if not is_possible or math.prod(max(1, size) for size in shape) * max(1, dtype.itemsize) > sys.maxsize:
        raise _broken(path, f"shape {_short(shape)} in its header; expected one that an array can have")


def _broken(path, fault):
    return ValueError(f"{path}: not an array in NumPy's .npy format: {fault}")


def _other_format(path, what, advice):
    return ValueError(f"{path}: not an array in NumPy's .npy format, but {what}; {advice.replace('{name}', str(path))}")


def _format(head):
    """What a file that begins so is, and what to do with it."""
    for magic, what, advice in FORMATS:
        if head.startswith(magic):
            return what, advice
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        return NPZ if first.endswith(b".npy") or len(head) < 30 else TORCH if first.endswith(b"/data.pkl") else ZIP
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        return SAFETENSORS
    if not head:
        return "an empty file", "expected an array that numpy.save has written"
    line = _first_line(head)
    if line:
        return f"text, which begins {_short(line, 40)}", SAVE.format('np.loadtxt("{name}", delimiter=",")')
    return "of another one", 'if it is numbers alone: np.save("x.npy", np.fromfile("{name}", DTYPE).reshape(SHAPE))'


def _first_line(head):
    """Of text; empty where it is none."""
    try:
        # which may be cut within a character
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return ""
    line = text.strip().partition("\n")[0].strip()
    return line if line.isprintable() and "\0" not in text else ""


def _short(value, characters=100):
    try:
        shown = repr(value)
    except ValueError:
        # as Python says of an int of thousands of digits
        return "of numbers too long to show"
    return shown if len(shown) <= characters else f"{shown[:characters]}..."


def unchanged(path, is_unchanged):
    if not is_unchanged:
        raise ValueError(f"{path}: changed while it was read")


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
