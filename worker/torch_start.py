"""Imports torch faster than `import torch` does: a worker that starts again is one that clients wait for."""

import gc
import os
import sys
from types import ModuleType

# Shape functions of the meta device, and through them torch's operations written in Python: a quarter of the import.
# Nothing that runs a decoder on a CPU asks for them. Whoever does (torch.compile, torch.Generator) imports this first.
_LEFT_OUT = "torch._meta_registrations"
# An idle OpenMP thread sleeps. By default it spins for milliseconds, on the core of whoever it waits for: beside one
# busy process on two cores, steps took five to twenty times as long. A machine of one's own may want "active".
_WAIT_POLICY = "passive"


def import_torch(device: str) -> None:
    """Import torch, once, for work on `device`; where that is a CPU, without what is not used there."""
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", _WAIT_POLICY)  # read by OpenMP as it is loaded
    gc.disable()  # it would walk through all modules again and again
    if device == "cpu":
        sys.modules[_LEFT_OUT] = ModuleType(_LEFT_OUT)
    import torch

    if device == "cpu":
        del sys.modules[_LEFT_OUT]
        vars(torch).pop(_LEFT_OUT.removeprefix("torch."), None)
    gc.enable()
