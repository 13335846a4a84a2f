"""Names a full block by its content and everything before it, so that equal prefixes are found by equal hashes.

hash(block) = H(parent hash, token ids). The chain starts at a root that takes in every extra key, tagged and
length-prefixed, so that no two different keys run into the same bytes: block_hash is collision-resistant (BLAKE2b,
16 bytes), never a predictable integer hash.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def root_hash(model_fingerprint: str, kv_dtype: str, adapter: str, cache_salt: str) -> bytes:
    """The parent of a sequence's first block: 16 bytes that differ wherever any key differs."""
    digest = blake2b(digest_size=HASH_BYTES, person=b"pagoda-root")
    for tag, key in ((b"M", model_fingerprint), (b"D", kv_dtype), (b"A", adapter), (b"S", cache_salt)):
        value = key.encode()
        digest.update(tag + len(value).to_bytes(8, "little") + value)
    return digest.digest()


def block_hash(parent_hash: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of one full block: 16 bytes over its parent's hash and its ids as little-endian 32-bit words."""
    return blake2b(parent_hash + array("I", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


def extend_chain(root: bytes, hashes: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Appends to `hashes` the hashes of all full blocks of `token_ids` that it does not have yet."""
    parent = hashes[-1] if hashes else root
    for end in range((len(hashes) + 1) * block_size, len(token_ids) + 1, block_size):
        parent = block_hash(parent, token_ids[end - block_size : end])
        hashes.append(parent)
