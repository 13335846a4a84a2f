"""Chain hashes: equal exactly where everything before is equal, whatever keys and ids run into each other."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.block_hash import HASH_BYTES, block_hash, extend_chain, root_hash

ROOT = Path(__file__).parents[2]
KEYS = st.tuples(*[st.text(max_size=6)] * 4)
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=12)


@settings(deadline=None)
@given(KEYS, KEYS)
def test_roots_differ_wherever_a_key_differs(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert (root_hash(*one) == root_hash(*other)) == (one == other)


def test_adapter_and_salt_that_run_into_each_other_do_not_collide() -> None:
    """Tagged and length-prefixed: no way of cutting the same text into keys gives the same root."""
    parts = ["", "a", "aa", "aaa", "A", "S", "aS", "Sa", "\x00", "1", "\x01\x00\x00\x00\x00\x00\x00\x00a"]
    roots = {root_hash("model", "float32", adapter, salt) for adapter, salt in product(parts, parts)}
    assert len(roots) == len(parts) ** 2
    swapped = {
        root_hash(*keys) for keys in (("a", "b", "", ""), ("b", "a", "", ""), ("", "", "a", "b"), ("ab", "", "", ""))
    }
    assert len(swapped) == 4


def test_a_tenants_salt_reaches_every_block_of_its_chain() -> None:
    chains = []
    for salt in ("", "a", "b"):
        hashes: list[bytes] = []
        extend_chain(root_hash("m", "float32", "", salt), hashes, [7] * 16, 4)
        chains.append(hashes)
    assert len({hash_ for hashes in chains for hash_ in hashes}) == 12


@settings(deadline=None)
@given(IDS, IDS)
def test_blocks_differ_wherever_an_id_differs(one: list[int], other: list[int]) -> None:
    root = root_hash("m", "float32", "", "")
    assert (block_hash(root, one) == block_hash(root, other)) == (one == other)


def test_equal_blocks_behind_unequal_ones_are_unequal() -> None:
    root = root_hash("m", "float32", "", "")
    assert block_hash(block_hash(root, [1, 1]), [3, 3]) != block_hash(block_hash(root, [2, 2]), [3, 3])
    assert block_hash(root, [1, 1]) != block_hash(block_hash(root, [1, 1]), [1, 1])


def test_hashes_are_long_not_predictable_and_the_same_in_every_process() -> None:
    """BLAKE2b, and not Python's hash(): an attacker can't make a prompt whose block is another tenant's."""
    root = root_hash("fingerprint", "float32", "", "")
    assert len(root) == len(block_hash(root, [1, 2, 3])) == HASH_BYTES == 16
    program = "from scheduler.block_hash import *; print(block_hash(root_hash('f', 'float32', '', 's'), [1, 2]).hex())"
    here = block_hash(root_hash("f", "float32", "", "s"), [1, 2]).hex()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        assert subprocess.check_output([sys.executable, "-c", program], env=env, text=True).strip() == here


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.lists(st.integers(0, 40), max_size=4), st.sampled_from([1, 4, 16]))
def test_a_chain_grows_by_its_full_blocks_in_whatever_steps(ids: list[int], cuts: list[int], block_size: int) -> None:
    root = root_hash("m", "float32", "", "")
    whole: list[bytes] = []
    extend_chain(root, whole, ids, block_size)
    assert len(whole) == len(ids) // block_size
    stepwise: list[bytes] = []
    for cut in sorted(cuts):
        extend_chain(root, stepwise, ids[:cut], block_size)
    extend_chain(root, stepwise, ids, block_size)
    assert stepwise == whole
