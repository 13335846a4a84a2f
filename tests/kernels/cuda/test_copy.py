"""Block copies, emulated, against the reference kernels."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import BlockCopy
from kernels.cuda.attention import Backend, independent_runs
from kernels.cuda.variant import Variant
from kernels.reference import ReferenceKernels
from tests.kernels.cuda.backends import each_backend
from tests.kernels.cuda.steps import kernels_for
from tests.kernels.guarded import guarded

NUM_BLOCKS = 6

variants = st.sampled_from(
    [
        Variant(torch.bfloat16, 128, 16),
        Variant(torch.float32, 64, 16),
        Variant(torch.float16, 80, 32, kv_dtype=torch.int8),
    ]
)
copies = st.builds(
    BlockCopy, st.integers(0, NUM_BLOCKS - 1), st.integers(0, NUM_BLOCKS - 1), st.integers(1, 16)
).filter(lambda copy: copy.src_block_id != copy.dst_block_id)


@each_backend
@settings(max_examples=25, deadline=None)
@given(variants, st.integers(1, 3), st.integers(1, 3), st.lists(copies, max_size=6), st.integers(0, 2**32 - 1))
def test_copies_as_if_in_order(
    backend: Backend, variant: Variant, num_layers: int, num_kv_heads: int, wanted: list[BlockCopy], order_seed: int
) -> None:
    """Chains and swaps among them included."""
    kernels = kernels_for(backend, variant, num_kv_heads, num_kv_heads)
    shape = (num_layers, 2, NUM_BLOCKS, num_kv_heads, kernels.kv_format.head_bytes)
    expected = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = guarded(expected)
    kernels.library(has_window=False).seed_emulation(order_seed)
    kernels.copy_blocks(found, wanted)
    ReferenceKernels(kernels.device, kernels.shape).copy_blocks(expected, wanted)
    assert torch.equal(found, expected)


@given(st.lists(copies, min_size=1, max_size=8))
def test_runs_of_copies_are_independent_and_whole(wanted: list[BlockCopy]) -> None:
    runs = independent_runs(wanted)
    assert [i for start, end in runs for i in range(start, end)] == list(range(len(wanted)))
    for start, end in runs:
        written = [copy.dst_block_id for copy in wanted[start:end]]
        assert len(set(written)) == len(written)
        assert not {copy.src_block_id for copy in wanted[start:end]} & set(written)


def test_copies_from_one_block_to_many_are_one_run() -> None:
    assert independent_runs([BlockCopy(1, 2, 16), BlockCopy(1, 3, 16), BlockCopy(4, 5, 3)]) == [(0, 3)]
