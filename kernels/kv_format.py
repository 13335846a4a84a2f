"""How a block holds keys and values: the one description of it, for all kernels and for whoever looks into a pool.

A pool is bytes. 16-bit and 32-bit elements are stored as they are. 8-bit ones come with a float32 scale per token and
KV head: an element times its scale is what was written, so scales stay out of the sums over dimensions, and a token's
scale never depends on its neighbours'.
"""

from dataclasses import dataclass

import torch

SCALE_BYTES = 4
# A pool of these holds nothing but NaN: of them is a NaN of any length of float made, and so is every scale. NAN_BITS
# are as many of them as an integer has bytes.
NAN_BYTE = 0xFF
NAN_BITS = -1
# The largest element of the 8-bit types.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# By element size, what elements are moved as: not every device knows how to index every dtype.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What one KV head has in a block: its elements, then, where they are scaled, `block_size` scales.

    dtype: of the elements. key_group: dimensions of a key that lie together; value_group: tokens of which the values
    lie together, dimension by dimension. Keys are [head_dim / key_group, block_size, key_group], values [block_size /
    value_group, head_dim, value_group]: pairs are what a CPU's bfloat16 products take, of the depth that they sum over.
    """

    dtype: torch.dtype
    num_kv_heads: int
    head_dim: int
    block_size: int
    key_group: int
    value_group: int = 1

    @property
    def is_scaled(self) -> bool:
        """Whether elements have 8 bits and a scale."""
        return self.dtype in LARGEST

    @property
    def element_bytes(self) -> int:
        """Of all elements of a head in a block."""
        return self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def head_bytes(self) -> int:
        """Of a head in a block."""
        return self.element_bytes + self.block_size * SCALE_BYTES * self.is_scaled

    def keys(self, plane: torch.Tensor) -> torch.Tensor:
        """The keys in `plane`, uint8 [..., head_bytes], in place: [..., block_size, groups, key_group]."""
        groups = self.head_dim // self.key_group
        elements = plane[..., : self.element_bytes].view(self.dtype)
        return elements.view(*plane.shape[:-1], groups, self.block_size, self.key_group).transpose(-3, -2)

    def values(self, plane: torch.Tensor) -> torch.Tensor:
        """The values in `plane`, uint8 [..., head_bytes], in place: [..., groups, value_group, head_dim]."""
        elements = plane[..., : self.element_bytes].view(self.dtype)
        return elements.view(*plane.shape[:-1], -1, self.head_dim, self.value_group).transpose(-2, -1)

    def scales(self, plane: torch.Tensor) -> torch.Tensor | None:
        """The scales in `plane`, uint8 [..., head_bytes], in place: [..., block_size] float32."""
        return plane[..., self.element_bytes :].view(torch.float32) if self.is_scaled else None

    def places(self, slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Block, head and slot of each head of each token of a step: together [num_tokens, num_kv_heads]."""
        slots = slot_mapping[:, None]
        heads = torch.arange(self.num_kv_heads, device=slots.device)
        return torch.div(slots, self.block_size, rounding_mode="floor"), heads, slots % self.block_size

    def write_keys(self, plane: torch.Tensor, places: tuple[torch.Tensor, ...], keys: torch.Tensor) -> None:
        """Put `keys`, [..., head_dim], into `plane`; places: their indices there, the slot last; () for all of it."""
        elements = self.keys(plane)
        self._bits(elements)[places] = self._quantized(plane, places, keys).view(*keys.shape[:-1], *elements.shape[-2:])

    def write_values(self, plane: torch.Tensor, places: tuple[torch.Tensor, ...], values: torch.Tensor) -> None:
        """As `write_keys`."""
        elements, bits = self.values(plane), self._quantized(plane, places, values)
        if places:
            *blocks_and_heads, slots = places
            within = torch.div(slots, self.value_group, rounding_mode="floor"), slots % self.value_group
            self._bits(elements)[*blocks_and_heads, *within] = bits
        else:
            self._bits(elements)[:] = bits.view(elements.shape)

    def read_keys(self, plane: torch.Tensor) -> torch.Tensor:
        """A float32 copy of all keys in `plane`: [..., block_size, head_dim]."""
        return self._scaled(self.keys(plane).float().flatten(-2).contiguous(), plane)

    def read_values(self, plane: torch.Tensor) -> torch.Tensor:
        """A float32 copy of all values in `plane`: [..., block_size, head_dim]."""
        return self._scaled(self.values(plane).float().flatten(-3, -2).contiguous(), plane)

    def slots(self, pool: torch.Tensor, first: int, last: int) -> list[torch.Tensor]:
        """The bits of slots first to last of every block, as integers, in place.

        pool: [..., 2, any, num_kv_heads, head_bytes]; views: [..., any, num_kv_heads, some of the slots, any, any].
        """
        views = [self.keys(pool[..., 0, :, :, :])[..., first:last, :, :]]
        values = self.values(pool[..., 1, :, :, :])
        for offset in range(self.value_group):
            start, end = (-(-(slot - offset) // self.value_group) for slot in (first, last))
            views.append(values[..., start:end, offset, :, None])
        scales = self.scales(pool)
        views += [] if scales is None else [scales[..., first:last, None, None]]
        return [view.view(_BITS[view.dtype.itemsize]) for view in views]

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """rows: [..., head_dim], as elements, and their scales [...]: what is not finite makes its row's scale so."""
        if not self.is_scaled:
            return rows.to(self.dtype), None
        largest = LARGEST[self.dtype]
        highest = rows.float().abs().amax(dim=-1)
        scales = highest / highest.new_full((), largest)  # on a GPU torch multiplies by a number's reciprocal
        scaled = (rows.float() / scales[..., None].clamp(min=torch.finfo(torch.float32).tiny)).clamp(-largest, largest)
        return (scaled.round() if self.dtype == torch.int8 else scaled).nan_to_num(0.0).to(self.dtype), scales

    def _quantized(self, plane: torch.Tensor, places: tuple[torch.Tensor, ...], rows: torch.Tensor) -> torch.Tensor:
        """The bits of `rows`, [..., head_dim]; their scales are written."""
        elements, row_scales = self.quantize(rows)
        scales = self.scales(plane)
        if scales is not None and row_scales is not None:
            scales[places] = row_scales
        return self._bits(elements)

    def _bits(self, elements: torch.Tensor) -> torch.Tensor:
        return elements.view(_BITS[self.dtype.itemsize])

    def _scaled(self, rows: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
        scales = self.scales(plane)
        return rows if scales is None else rows * scales[..., None]
