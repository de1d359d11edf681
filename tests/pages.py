"""The code of the documentation: of the README, and of the pages under docs/."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$|^## (?P<title>[^\n]*)$", re.DOTALL | re.MULTILINE)
# to change the reader's machine is not for a test
NOT_RUN = {"sh", "text"}
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


class Block(NamedTuple):
    language: str
    code: str


class Program(NamedTuple):
    """What runs in one go: a section whose first block begins with an import, and those behind it which do not."""

    page: str
    title: str
    blocks: list[Block]

    def __str__(self):
        return f"{self.page}: {self.title}"

    @property
    def python(self):
        return "\n".join(block.code for block in self.blocks if block.language == "python")

    def missing(self):
        """The packages that it imports and that are not there."""
        nodes = list(ast.walk(ast.parse(self.python)))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        # packages whose files are read alone
        calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "find_spec"]
        imported |= {call.args[0].value for call in calls}
        packages = {name.partition(".")[0] for name in imported}
        return sorted(package for package in packages if importlib.util.find_spec(package) is None)

    @property
    def needs_device(self):
        """Whether it takes for granted that there is a CUDA device."""
        code = self.python
        names = ("import cupy", '"cuda"', "from nbnorm.cuda import")
        return any(name in code for name in names) and "cuda.is_available()" not in code


def pages():
    built = ROOT / "docs" / "_build"
    return [*sorted(ROOT.glob("*.md")), *(p for p in sorted((ROOT / "docs").rglob("*.md")) if built not in p.parents)]


def links(page):
    """Those to files, from its text."""
    return LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8")))


def programs():
    """Of all pages."""
    return [program for page in pages() for program in programs_of(page)]


def left_out():
    """What some of them need, and is not there."""
    return sorted({name for program in programs() for name in program.missing()})


def programs_of(page):
    found: list[Program] = []
    title, is_new = "the beginning", True
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["title"]:
            title, is_new = match["title"], True
        elif match["language"] not in NOT_RUN:
            block = Block(match["language"], match["code"])
            if not found or (is_new and block.code.startswith(("import ", "from "))):
                found.append(Program(page.relative_to(ROOT).as_posix(), title, []))
            found[-1].blocks.append(block)
            is_new = False
    return found


def program(page, title):
    """The one of a page that begins in a section of this title."""
    (found,) = (program for program in programs_of(ROOT / page) if program.title == title)
    return found
