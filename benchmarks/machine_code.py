"""What the CPU kernels become on processors that need not be here: tests/machine_code.json, and a table in docs/kernels.md.

Tests fail where a kernel's code has more of anything than is recorded, and where it has less, until this has recorded it:

    python benchmarks/machine_code.py

It takes a minute and a half of one core.
"""

import json
import sys
from pathlib import Path

from kernels import DOCUMENT, ROOT, rewrite
from tables import markdown
from tqdm import tqdm

sys.path.append(str(ROOT / "tests"))
import cpu_targets

RECORD = Path(cpu_targets.__file__).with_name("machine_code.json")
NAME = "machine code"


def main():
    names = tqdm(cpu_targets.TARGETS, file=sys.stderr, unit=" processors", leave=False, disable=None)
    found = {name: cpu_targets.recorded(cpu_targets.counts_for(name)) for name in names}
    record = {"compiled by": cpu_targets.compiled_by(), "counts": found}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rewrite(DOCUMENT, {NAME: table(record)})


def table(record):
    """A row for each kernel, a column for each processor."""
    counts = record["counts"]
    rows = []
    for title in next(iter(counts.values())):
        rows.append([*title.split(), *(of_target[title] for of_target in counts.values())])
    return f"{markdown(['pass', 'rows', 'type', *counts], rows)}\n\nBy {record['compiled by']}."


if __name__ == "__main__":
    main()
