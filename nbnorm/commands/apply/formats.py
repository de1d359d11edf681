"""What a file is, by its first bytes: of a kind that is read, or of one whose error says how to get an array out of it."""

import codecs
import os
from pathlib import Path

from nbnorm.commands.apply import files

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# all that is looked at: as much as tells text from numbers
HEAD_BYTES = 10_000
READ = ".npy, .npz, safetensors, HDF5 or zarr"

SAVE = 'np.save("x.npy", {})'
# how files of other formats begin, the more special first, what they are, and how to get a .npy file out of them
FORMATS = (
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
TORCH = "a file of torch.save", SAVE.format('torch.load("{name}")["NAME"].numpy()')
ZIP = "a zip file", "unpack it first"


def kind(path):
    """The kind of a file, "npy", "npz", "safetensors", "hdf5" or "zarr", whatever its name."""
    if files.is_zarr(path):
        return "zarr"
    with files.system_errors(path), Path(path).open("rb", buffering=0) as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(HDF5_MAGIC):
        return "hdf5"
    if _is_npz(head):
        return "npz"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    what, advice = _other(head)
    raise ValueError(f"{path}: {what}; expected {READ}; {advice.replace('{name}', os.fspath(path))}")


def _is_npz(head):
    """Whether it is a zip file whose first member, if it has one, is a .npy file."""
    return head[:4] == b"PK\x05\x06" or (head[:4] == b"PK\x03\x04" and _first_member(head).endswith(b".npy"))


def _first_member(head):
    return head[30 : 30 + int.from_bytes(head[26:28], "little")]


def _other(head):
    """What a file that begins so is, and what to do with it."""
    for magic, what, advice in FORMATS:
        if head.startswith(magic):
            return what, advice
    if head.startswith(b"PK\x03\x04"):
        return TORCH if _first_member(head).endswith(b"/data.pkl") else ZIP
    if not head:
        return "an empty file", "such as numpy.save writes"
    line = _first_line(head)
    if line:
        return f"text, which begins {files.short(line, 40)}", SAVE.format('np.loadtxt("{name}", delimiter=",")')
    return "an unknown format", 'if it is numbers alone: np.save("x.npy", np.fromfile("{name}", DTYPE).reshape(SHAPE))'


def _first_line(head):
    """Of text; empty where it is none."""
    try:
        # which may be cut within a character
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return ""
    line = text.strip().partition("\n")[0].strip()
    return line if line.isprintable() and "\0" not in text else ""
