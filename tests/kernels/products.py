"""Products to compute, and rows to choose from: random matrices and logits, and what should come of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kernels import Kernels, Norm
from tests.kernels.guarded import guarded

EPSILON = 1e-5
Place = Callable[[torch.Tensor], torch.Tensor]
"""A copy of a tensor where the kernels run."""


class Product:
    """A random matrix, rows for it, and all that `kernels.Linear` makes of them, in float64 and as found."""

    def __init__(self, num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng).to(dtype)

        self.weight, self.bias = random(num_outputs, num_inputs), random(num_outputs)
        self.gate_up, self.gate_up_bias = random(2 * num_outputs, num_inputs), random(2 * num_outputs)
        self.rows = random(num_rows, num_inputs)
        self.norm, self.total = Norm(random(num_inputs), EPSILON), random(num_rows, num_outputs)

    def expected(self, has_bias: bool, rounds_rows: bool = False) -> list[torch.Tensor]:
        """rounds_rows: to the dtype, before they are multiplied."""

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            if rounds_rows:
                x = x.to(weight.dtype).double()
            return F.linear(x, weight.double(), bias.double() if has_bias else None)

        rows, total = self.rows.double(), self.total.double()
        normed_rows = F.rms_norm(rows, (rows.shape[1],), self.norm.weight.double(), EPSILON)
        normed = linear(normed_rows, self.weight, self.bias)
        gate, up = linear(normed_rows, self.gate_up, self.gate_up_bias).chunk(2, dim=1)
        return [normed, normed, total + linear(rows, self.weight, self.bias), F.silu(gate) * up]

    def found(
        self,
        kernels: Kernels,
        has_bias: bool,
        some: slice = slice(None),
        place: Place = guarded,
    ) -> list[torch.Tensor]:
        linear = kernels.linear(place(self.weight), place(self.bias) if has_bias else None)
        gated = kernels.gated(place(self.gate_up), place(self.gate_up_bias) if has_bias else None)
        norm = Norm(place(self.norm.weight), self.norm.epsilon)
        rows, added = place(self.rows[some]), place(self.total[some])
        linear.add(rows, added)
        return [linear.of_normed(rows, norm), linear.logits(rows, norm), added, gated.of_normed(rows, norm)]


def check_what_is_not_finite(kernels: Kernels, place: Place = guarded) -> None:
    """It stays visible, in its own row and in no other. kernels: of bfloat16."""
    product = Product(3, 40, 20, torch.bfloat16, seed=1)
    product.rows[2, 1] = float("nan")
    product.gate_up_bias[3], product.gate_up_bias[25] = float("nan"), float("inf")  # of a gate, and of what one opens
    *ungated, gated = product.found(kernels, has_bias=True, place=place)
    for outputs in (*ungated, gated):
        assert outputs[2].isnan().all()
    for outputs in ungated:
        assert outputs[:2].isfinite().all()
    assert (~gated[:2].isfinite()).nonzero()[:, 1].tolist() == [3, 5, 3, 5]


def check_gate(kernels: Kernels, dtype: torch.dtype, gate: float, place: Place = guarded) -> None:
    """The bias alone makes gates and what they open."""
    bias = torch.cat((torch.full((16,), gate), torch.ones(16))).to(dtype)
    gated = kernels.gated(place(torch.zeros(32, 16, dtype=dtype)), place(bias))
    norm = Norm(place(torch.ones(16, dtype=dtype)), EPSILON)
    found = gated.of_normed(place(torch.ones(1, 16, dtype=dtype)), norm).cpu()
    expected = F.silu(torch.full((1, 16), gate)).to(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-30)


@st.composite
def greedy_cases(draw: st.DrawFn) -> tuple[torch.Tensor, set[int]]:
    """Logits [num_rows, vocab_size], few values, so that many are equal; and the rows with one that is not finite."""
    num_rows, vocab_size = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    values = draw(st.lists(st.integers(-3, 3), min_size=num_rows * vocab_size, max_size=num_rows * vocab_size))
    logits = torch.tensor(values, dtype=torch.float32).view(num_rows, vocab_size)
    broken = draw(st.dictionaries(st.integers(0, num_rows - 1), st.sampled_from([float("nan"), float("inf")])))
    for row, value in broken.items():
        logits[row, draw(st.integers(0, vocab_size - 1))] = value
    return guarded(logits), set(broken)


def check_choices(choices: torch.Tensor, logits: torch.Tensor, broken: set[int]) -> None:
    """choices: of `kernels.Kernels.greedy`."""
    token_ids, is_finite = choices
    assert is_finite.tolist() == [row not in broken for row in range(len(logits))]
    for row in set(range(len(logits))) - broken:
        assert token_ids[row] == logits[row].tolist().index(logits[row].max())
    assert ((token_ids >= 0) & (token_ids < logits.shape[1])).all()
