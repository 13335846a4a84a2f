"""Everything a Redis holds, in a form that can be compared."""

from struct import Struct

from redis import Redis

from scheduler.block_hash import HASH_BYTES

Value = bytes | dict[bytes, bytes] | set[bytes]
Dump = dict[bytes, tuple[Value, bool]]
POOL_ROW = Struct("<I16s")


def dump(client: Redis) -> Dump:
    """Key -> (value, whether it expires)."""
    keys = sorted(client.keys("*"))
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.type(key)
        types = pipeline.execute()
        for key, type_ in zip(keys, types, strict=True):
            {b"string": pipeline.get, b"hash": pipeline.hgetall, b"set": pipeline.smembers}[type_](key)
            pipeline.pttl(key)
        replies = pipeline.execute()
    return {key: (replies[2 * i], replies[2 * i + 1] >= 0) for i, key in enumerate(keys)}


def parse_pool(data: bytes) -> list[tuple[int, bytes | None]]:
    """(ref_count, hash or None) by block_id, the null block included; read without the store's own parser."""
    rows = POOL_ROW.iter_unpack(data)
    return [(ref_count, None if hash_ == bytes(HASH_BYTES) else hash_) for ref_count, hash_ in rows]


def parse_u32(data: bytes) -> list[int]:
    """Packed little-endian 32-bit words."""
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
