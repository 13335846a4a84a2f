"""Imports torch faster than `import torch` does: a worker that starts again is one that clients wait for."""

import gc
import sys
from types import ModuleType

# Shape functions of the meta device: a quarter of the import, and nothing here asks for a shape without its tensor.
# Whoever does (torch.compile too) imports this module first, and finds it.
_LEFT_OUT = "torch._meta_registrations"


def import_torch() -> None:
    """Import torch, once, without what a worker never uses, and without collecting garbage meanwhile."""
    if "torch" in sys.modules:
        return
    gc.disable()
    sys.modules[_LEFT_OUT] = ModuleType(_LEFT_OUT)
    try:
        import torch
    finally:
        del sys.modules[_LEFT_OUT]
        gc.enable()
    vars(torch).pop(_LEFT_OUT.removeprefix("torch."), None)
    # What is imported stays: later collections need not walk through it, which took longer than a step.
    gc.freeze()
