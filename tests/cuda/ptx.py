"""PTX as text, read into what the machine runs: a kernel, what it declares, and its instructions in their order.

Of the language it takes what numba-cuda's compilers write: one kernel that calls no functions, and one scope of registers.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

# of registers, memory and parameters; `.b` has only a size
TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "pred": np.dtype(bool),
}
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{(.*)\}", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?([\w$]+)")
VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?\s*;")
LABEL = re.compile(r"([\w$]+)\s*:")
INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z]\w*(?:\.\w+)*)(?:\s+(.*))?", re.DOTALL)
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
# not between the elements of a vector
BETWEEN_OPERANDS = re.compile(r",\s*(?![^{]*\})")
ADDRESS = re.compile(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


class Fault(Exception):  # noqa: N818  the usual word
    """What a GPU does not forgive or does not define, with the instruction, the thread and the address; or PTX unknown."""


class Register(NamedTuple):
    slot: int
    dtype: np.dtype


class Special(NamedTuple):
    """What a thread is told, such as %tid.x."""

    name: str


class Immediate(NamedTuple):
    """An integer, or the bits of a float."""

    value: int
    dtype: np.dtype | None


class Symbol(NamedTuple):
    """A variable, or the target of a branch."""

    name: str


class Address(NamedTuple):
    base: Register | Symbol
    offset: int


class Group(NamedTuple):
    """The elements of a vector, or the two destinations of a shuffle; None is what is thrown away."""

    elements: tuple


class Instruction(NamedTuple):
    """`guard` is the predicate that must be true, or with `is_negated` false."""

    text: str
    name: str
    operands: tuple
    guard: Register | None
    is_negated: bool


class Variable(NamedTuple):
    space: str
    name: str
    alignment: int
    nbytes: int


class Kernel(NamedTuple):
    """`labels` are of the instruction behind them."""

    name: str
    parameters: dict[str, np.dtype]
    most_threads: int
    registers: tuple[np.dtype, ...]
    variables: tuple[Variable, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@functools.lru_cache(maxsize=1024)
def parse(text):
    """The one kernel of a text of PTX."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text.strip("\0"), flags=re.DOTALL)
    entries = ENTRY.findall(text)
    if len(entries) != 1 or ".func" in text or text.count(".entry") != 1:
        raise Fault("not one kernel without functions")
    name, parameters, directives, body = entries[0]
    most = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    most_threads = int(np.prod([int(n or 1) for n in most.groups()])) if most else 1024
    variables = tuple(
        Variable(space, variable, int(alignment or TYPES[kind].itemsize), TYPES[kind].itemsize * int(count or 1))
        for space, alignment, kind, variable, count in VARIABLE.findall(text)
    )
    reader = _Body()
    for statement in body.split(";"):
        reader.read(statement)
    registers = tuple(dtype for _, dtype in sorted(reader.registers.values()))
    return Kernel(
        name, _parameters(parameters), most_threads, registers, variables, tuple(reader.instructions), reader.labels
    )  # fmt: skip


def _parameters(text):
    parameters = {}
    for declared in filter(None, (part.strip() for part in text.split(","))):
        found = PARAMETER.fullmatch(declared)
        if found is None:
            raise Fault(f"unknown parameter: {declared}")
        parameters[found[2]] = TYPES[found[1]]
    return parameters


class _Body:
    """The statements of a kernel, one after another."""

    def __init__(self):
        self.registers = {}
        self.instructions = []
        self.labels = {}
        # by their text, which comes again and again
        self.operands = {}

    def read(self, statement):
        statement = statement.strip()
        while found := LABEL.match(statement):
            self.labels[found[1]] = len(self.instructions)
            statement = statement[found.end() :].strip()
        if statement.startswith(".reg"):
            self._declare(statement)
        elif statement and not statement.startswith((".shared", ".local", ".pragma")):
            self.instructions.append(self._instruction(statement))

    def _declare(self, statement):
        _, kind, names = statement.split(None, 2)
        for name in (name.strip() for name in names.split(",")):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for declared in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.registers[declared] = Register(len(self.registers), TYPES[kind[1:]])

    def _instruction(self, statement):
        text = " ".join(statement.split())
        found = INSTRUCTION.fullmatch(text)
        if found is None:
            raise Fault(f"unknown: {text}")
        negation, guard, name, operands = found.groups()
        parts = BETWEEN_OPERANDS.split(operands) if operands else []
        return Instruction(
            text, name, tuple(self._operand(part.strip(), text) for part in parts),
            self.registers[guard] if guard else None, negation == "!",
        )  # fmt: skip

    def _operand(self, text, instruction):
        if text in self.registers:
            return self.registers[text]
        if text not in self.operands:
            self.operands[text] = self._other_operand(text, instruction)
        return self.operands[text]

    def _other_operand(self, text, instruction):
        if text == "_":
            return None
        if INTEGER.fullmatch(text):
            return Immediate(int(text.rstrip("U"), 0), None)
        if found := FLOAT.fullmatch(text):
            return Immediate(int(found[1] or found[2], 16), TYPES["f32" if found[1] else "f64"])
        if found := ADDRESS.fullmatch(text):
            return Address(self._operand(found[1], instruction), int(found[2] or "0", 0))
        if text.startswith("{") and text.endswith("}"):
            return Group(tuple(self._operand(part.strip(), instruction) for part in text[1:-1].split(",")))
        if re.fullmatch(r"[^|]+\|[^|]+", text):
            return Group(tuple(self._operand(part.strip(), instruction) for part in text.split("|")))
        if re.fullmatch(r"%[a-z]+(\.[xyz])?", text):
            return Special(text)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise Fault(f"unknown operand {text}: {instruction}")
