"""A program that runs `nbnorm apply` again and again, and disturbs each run: `python disturbed.py COUNT`.

In the working directory is y.npy, which each run finds as it was. Prints, by what was done, lists of [exit code, which y.npy
is there: "old", "new" or "neither", number of unfinished files].
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from nbnorm.__main__ import main
from nbnorm.commands import apply as apply_module

ARGUMENTS = ["apply", "x.npy", "-o", "y.npy", "--normalized-shape", "64"]
# done to the process or its input at a random moment, and how many times as rarely as the first
KINDS = {
    "killed": (lambda pid: os.kill(pid, signal.SIGKILL), 1),
    "terminated": (lambda pid: os.kill(pid, signal.SIGTERM), 3),
    "input cut": (lambda pid: os.truncate("x.npy", random.randrange(1 << 20)), 3),
}
# calls on the way to the new name, before or after which a run kills itself
STEPS = [(os, "fsync", "before"), (Path, "chmod", "before"), (Path, "replace", "before"), (Path, "replace", "after")]


def outcomes(count):
    # small blocks: many moments for it, and no threads, which would not be there after a fork
    apply_module.BLOCK_BYTES = 1 << 14
    np.save("x.npy", np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32))
    old = {name: Path(name).read_bytes() for name in ("x.npy", "y.npy")}
    # compiles, for all that follow
    assert main(ARGUMENTS) == 0
    new = Path("y.npy").read_bytes()
    *undisturbed, seconds = outcome(old, new)
    result = {"undisturbed": [undisturbed]}
    for kind, (disturb, share) in KINDS.items():
        moments = [random.uniform(0, 1.1 * seconds) for _ in range(count // share)]
        result[kind] = [outcome(old, new, disturb, moment)[:3] for moment in moments]
    result["killed at each step"] = [outcome(old, new, step=step)[:3] for step in STEPS]
    return result


def outcome(old, new, disturb=lambda pid: None, moment=0.0, step=None):
    """Exit code, which y.npy there is, the number of unfinished files, and the seconds of a run."""
    for name, data in old.items():
        Path(name).write_bytes(data)
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        try:
            if step is not None:
                kill_at(*step)
            os._exit(main(ARGUMENTS))
        finally:
            # where it raised something
            os._exit(99)
    time.sleep(moment)
    disturb(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.perf_counter() - start
    unfinished = list(Path().glob(".nbnorm-*"))
    for path in unfinished:
        path.unlink()
    found = {old["y.npy"]: "old", new: "new"}.get(Path("y.npy").read_bytes(), "neither")
    return code, found, len(unfinished), seconds


def kill_at(owner, name, when):
    function = getattr(owner, name)

    def kill(*arguments):
        if when == "after":
            function(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, kill)


if __name__ == "__main__":
    random.seed(0)
    print(json.dumps(outcomes(int(sys.argv[1]))))
