"""FlashInfer's attention over the same blocks as ours, for `kernels.cuda.bench`. It need not be installed."""

import importlib
from collections.abc import Callable, Sequence

import torch

from kernels import AttentionMetadata, AttentionShape

WORKSPACE_BYTES = 256 * 2**20
HEAD_MAJOR = "HND"


def flashinfer_candidates(
    shape: AttentionShape,
    metadata: AttentionMetadata,
    query: torch.Tensor,
    planes: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, what attends to one layer after the other and returns what the last one makes; none without FlashInfer.

    query: [num_tokens, num_heads, head_dim], as many tokens of each sequence; planes: keys and values of each layer,
    [num_blocks, num_kv_heads, block_size, head_dim].
    """
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError:
        return {}
    lens = metadata.host_context_lens
    num_blocks = -(-lens // shape.block_size)
    device = query.device
    ends = torch.from_numpy(num_blocks).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device, torch.int32)
    ids = [row[:count] for row, count in zip(torch.from_numpy(metadata.host_block_tables), num_blocks, strict=True)]
    last_lens = torch.from_numpy(lens - (num_blocks - 1) * shape.block_size).to(device, torch.int32)
    table = (starts, torch.cat(ids).to(device), last_lens)
    sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)
    dtypes = {"q_data_type": shape.dtype, "kv_data_type": shape.dtype, "sm_scale": shape.scale}

    def workspace() -> torch.Tensor:
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    wrappers = {}
    if metadata.max_query_len == 1:
        for name, use_tensor_cores in (("flashinfer", False), ("flashinfer, tensor cores", True)):
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace(), HEAD_MAJOR, use_tensor_cores=use_tensor_cores
            )
            wrapper.plan(*table, *sizes, **dtypes)
            wrappers[name] = wrapper
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), HEAD_MAJOR)
        wrapper.plan(metadata.cu_seqlens_q, *table, *sizes, causal=True, **dtypes)
        wrappers["flashinfer"] = wrapper

    def candidate(run: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: [run(query, plane) for plane in planes][-1]

    return {name: candidate(wrapper.run) for name, wrapper in wrappers.items()}
