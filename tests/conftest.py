import gc
import importlib
import os
import sys

import pytest

from lib import distributed, progress

# Before torch is imported, and for the processes that tests start: the networks are so small that
# threads would wait for each other, and the tests themselves run side by side.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """A run measures its CPU with a matrix product of a second, for `mfu`: no test needs it."""
    monkeypatch.setattr(distributed, "measure_peak", lambda *_: 1e12)


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch):
    """On a slow machine they would be in the output that tests compare."""
    monkeypatch.setattr(progress, "start_printer", lambda: None)


@pytest.fixture(scope="session")
def torchrun():
    """How a command begins that runs a script in two processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="session")
def quick_collect():
    """Leaves the objects of imported modules out of gc.collect(), which takes 0.2 s with them."""
    importlib.import_module("torch._dynamo")             # else the first optimizer imports it
    gc.collect()
    gc.freeze()
