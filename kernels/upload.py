"""Arrays on their way to a device. Beside a GPU they go through pinned memory, so that nobody waits.

From pageable memory a copy may wait for all that the device still has to do; from pinned memory it is one more entry in
its queue, and torch keeps the memory until it is done.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def staged(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """On the host, ready for a `copy_(..., non_blocking=True)` to `device`; for a CPU, the array's own memory."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host if device.type == "cpu" else host.pin_memory()


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """On `device`, once that gets there; for a CPU, the array's own memory."""
    host = staged(array, device)
    return host if device.type == "cpu" else host.to(device, non_blocking=True)
