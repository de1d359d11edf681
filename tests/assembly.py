"""What is in a function's assembly, as LLVM's comments tell it: which loops are innermost, what is spilled, what was masked.

Where a processor lacks an access that leaves out lanes, LLVM makes a branch and an access of each, and names these blocks.
"""

import re
from collections import Counter
from typing import NamedTuple

FUNCTION = r"-- Begin function {}\n(.*?)-- End function"
# of a label or of none, in the languages of x86-64, of ARM, and of Apple's ARM
COMMENT = r"(?:#|//|;)"
LABEL = re.compile(r"^(?:\.?L(BB\d+_\d+):|" + COMMENT + r" (%bb\.\d+):)", re.MULTILINE)
NAME = re.compile(COMMENT + r" %(\S+)$", re.MULTILINE)
INNER_LOOP = re.compile(r"This Inner Loop Header: Depth=\d+")
IN_LOOP = re.compile(r"in Loop: Header=(\S+) Depth=\d+")
LANE = re.compile(r"cond\.(?:load|store)\d*")
# more than a number, which no loop of ours keeps sixteen of
STACK = re.compile(r"(\d+)-byte (?:Folded )?(Spill|Reload)$", re.MULTILINE)
VECTOR_BYTES = 16
CALL = re.compile(r"^\t(?:callq?|blr?)\t(\S+)", re.MULTILINE)
REGISTER = re.compile(r"x\d+|\*%r\w+")
# a function that may be far away is called by its address, which comes into a register before
ADDRESS = re.compile(r"(?<=movabsq\t\$)[A-Za-z_][\w.]*|(?<=, _)[A-Za-z_][\w.]*(?=@GOTPAGEOFF)")
# a constant's is loaded the same way
DATA = re.compile(r"^_?([\w.]+):.*\n\t\.(?:asci[iz]|byte)", re.MULTILINE)


class Counts(NamedTuple):
    """Branches a lane, anywhere; spills and reloads of vectors, and calls, in innermost loops; what is called, anywhere."""

    lane_branches: int
    spills: int
    reloads: int
    calls: int
    called: list[str]


def counts(text, function):
    (code,) = re.findall(FUNCTION.format(re.escape(function)), text, re.DOTALL)
    found = list(blocks(code))
    inner = [block for block, is_inner in found if is_inner]
    on_stack = Counter(kind for block in inner for size, kind in STACK.findall(block) if int(size) >= VECTOR_BYTES)
    names = (NAME.search(block.split("\n\t", 1)[0]) for block, _ in found)
    return Counts(
        sum(name is not None and LANE.fullmatch(name[1]) is not None for name in names),
        on_stack["Spill"],
        on_stack["Reload"],
        sum(len(CALL.findall(block)) for block in inner),
        sorted(called(code) - set(DATA.findall(text))),
    )


def blocks(code):
    """Each from its label on, and whether it is in a loop that has no other in it."""
    starts = list(LABEL.finditer(code))
    ends = [start.start() for start in starts[1:]] + [len(code)]
    texts = [(start[1], code[start.start() : end]) for start, end in zip(starts, ends, strict=True)]
    headers = {label for label, text in texts if INNER_LOOP.search(text)}
    for label, text in texts:
        loop = IN_LOOP.search(text)
        yield text, label in headers or (loop is not None and loop[1] in headers)


def called(code):
    """Names of functions; also of one whose address is kept for another reason."""
    by_name = {target for target in CALL.findall(code) if not REGISTER.fullmatch(target)}
    # Apple's have a _ before all names of C's
    return {name.removeprefix("_") for name in by_name | set(ADDRESS.findall(code))}
