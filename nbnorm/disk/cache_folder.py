"""The folder of compiled kernels: which one it is, and how it stays small.

A kernel's file is code that the process runs. The default folder is therefore used only where it is the user's own, and no
folder that all may write to, such as the system's for temporary files, stands in for it.
"""

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from numba.core import config
from numba.misc.appdirs import AppDirs

# a kernel takes 35 to 110 KB, so that there is room for 4,000; a program needs two to eight
LIMIT_BYTES = 1 << 28
# a file's time of change says when it was last used, to the day, so that reading it mostly writes nothing
DAY = 24 * 3600
# no process takes this long to write one: it was killed
UNFINISHED_SECONDS = 3600
# nothing else is counted or deleted, wherever the folder is
KERNEL = re.compile(r"[0-9a-f]{64}\.nbnorm")
UNFINISHED = re.compile(r"[0-9a-f]{64}\.nbnorm\.[0-9a-f]{16}")


def place():
    """The folder, which may not be there yet, and what speaks against using it, or None.

    A folder that is named is trusted as it is.
    """
    named = os.environ.get("NBNORM_CACHE_DIR")
    if named:
        return Path(named), None
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR) / "nbnorm", None
    folder = Path(AppDirs("nbnorm", appauthor=False).user_cache_dir)
    if not folder.is_absolute():
        # XDG_CACHE_HOME is empty or relative, which its specification says to ignore
        with suppress(RuntimeError):
            folder = Path.home() / ".cache" / "nbnorm"
    if not folder.is_absolute():
        return folder, "this user has no home folder"
    return folder, _distrust(folder)


def _distrust(folder):
    # a profile on Windows is its user's own
    if not hasattr(os, "geteuid"):
        return None
    for existing in (folder, *folder.parents):
        with suppress(OSError):
            status = existing.stat()
            break
    else:
        return None
    user = os.geteuid()
    # root may make a folder in the home of the user whose HOME it has, who could then not write to it
    if status.st_uid != user and (existing == folder or user == 0):
        return f"{existing} belongs to another user"
    if existing == folder and status.st_mode & 0o002:
        return f"{existing} can be written to by all users"
    return None


def fault_of_writing(folder):
    """What keeps kernels from being left in the folder, or None."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
    if not existing.is_dir():
        return f"{existing} is no folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written to"


def read(name):
    """A kernel's file; empty where there is none."""
    folder, distrust = place()
    if distrust is not None:
        return b""
    with suppress(OSError):
        with (folder / name).open("rb", buffering=0) as file:
            content = file.readall()
            age = time.time() - os.fstat(file.fileno()).st_mtime
        # also of a clock that was wrong
        if abs(age) > DAY:
            with suppress(OSError):
                os.utime(folder / name)
        return content
    return b""


def write(name, content):
    """Put a kernel's file in place whole, and delete the ones unused for longest that are too many with it."""
    folder, distrust = place()
    if distrust is not None:
        return
    temporary = folder / f"{name}.{os.urandom(8).hex()}"
    try:
        # as the specification of XDG_CACHE_HOME says, but for a named folder, whose kernels other users may read
        folder.mkdir(mode=0o755 if is_named() else 0o700, parents=True, exist_ok=True)
        # whatever the umask is, no other user may write to it
        temporary.touch(mode=0o644, exist_ok=False)
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return
    make_room(folder)


def is_named():
    return bool(os.environ.get("NBNORM_CACHE_DIR") or config.CACHE_DIR)


def make_room(folder):
    """Delete what killed processes have left, and the kernels unused for longest that are beyond the limit."""
    now = time.time()
    kernels, unfinished = files(folder)
    for path, status in unfinished:
        if abs(now - status.st_mtime) > UNFINISHED_SECONDS:
            delete(path)
    total = sum(status.st_size for _, status in kernels)
    for path, status in sorted(kernels, key=lambda kernel: kernel[1].st_mtime):
        if total <= LIMIT_BYTES:
            break
        delete(path)
        total -= status.st_size


def files(folder):
    """Lists of (path, status) in the folder: of kernels, and of what was not finished."""
    kernels, unfinished = [], []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            # others may delete it meanwhile
            with suppress(FileNotFoundError):
                if KERNEL.fullmatch(entry.name):
                    kernels.append((Path(entry.path), entry.stat(follow_symlinks=False)))
                elif UNFINISHED.fullmatch(entry.name):
                    unfinished.append((Path(entry.path), entry.stat(follow_symlinks=False)))
    return kernels, unfinished


def delete(path):
    """Where another process has not, or holds it open on a system that then does not."""
    with suppress(OSError):
        path.unlink()
