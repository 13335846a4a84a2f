"""What is sampled at random from logits, as `sample.h` wants it."""

import numpy as np
import torch

from kernels import Draws
from kernels.cpu.binding import SampleCall, address


class PreparedDraws:
    """A call, all that it points to, and the token ids that it chooses: [num_draws]."""

    def __init__(self, logits: torch.Tensor, draws: Draws) -> None:
        self.token_ids = torch.empty(len(draws.rows), dtype=torch.int64)
        given = (draws.rows, draws.temperatures, draws.top_k, draws.top_p, draws.min_p, draws.uniforms)
        self._columns = [np.ascontiguousarray(column) for column in given]
        self._logits = logits
        self.call = SampleCall(
            logits.data_ptr(),
            *(address(column) for column in self._columns),
            self.token_ids.data_ptr(),
            len(self.token_ids),
            logits.shape[1],
            torch.get_num_threads(),
        )
