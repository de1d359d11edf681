"""Does the soak, which is run by hand for minutes, hold for seconds?"""

from pathlib import Path

import pytest

import soak


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say how much memory is in use")
def test_mixed_calls_from_eight_threads(monkeypatch):
    monkeypatch.setattr(soak, "SHAPES", [(7, 33), (200, 768), (3, 70_000)])
    monkeypatch.setattr(soak, "DTYPES", soak.DTYPES[:1])
    calls, wrong, early, late = soak.soak(4, 8)
    assert not wrong
    assert min(calls) > 0
    # what is kept of large results, and malloc's arenas
    assert late < early + 300
