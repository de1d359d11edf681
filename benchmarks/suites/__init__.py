"""The suites that asv runs over the history of the project; docs/benchmarking.md says how.

asv imports every file in here to learn its names, and measures each combination of parameters in a process of its own.
"""

import sys
from pathlib import Path

# where limits, timing, contestants and cuda_arrays are
sys.path.insert(0, str(Path(__file__).parent.parent))
