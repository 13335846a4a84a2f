"""The packed work: every item of the work list once, in the grid that it fits."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels.cuda.work import ITEM_FIELDS, pack_work
from kernels.work_list import SplitRule, make_work_list

lens = st.lists(st.tuples(st.integers(0, 700), st.one_of(st.just(1), st.integers(1, 90))), min_size=1, max_size=6)


@given(lens, st.integers(1, 16), st.sampled_from([0, 50]), st.integers(1, 9))
def test_every_item_has_its_place(pairs: list[tuple[int, int]], group_size: int, window: int, num_units: int) -> None:
    before, new = np.array(pairs, np.int64).T
    max_decode_queries = 16 // group_size
    rule = SplitRule(64 // group_size, 32, 4, max_decode_queries)
    work = make_work_list(before + new, new, 16, window, rule)
    packed = pack_work(work, max_decode_queries, num_units)
    units = packed.values[: packed.decode_offset]
    decode = packed.values[packed.decode_offset : packed.prefill_offset].reshape(-1, ITEM_FIELDS)
    prefill = packed.values[packed.prefill_offset :].reshape(-1, ITEM_FIELDS)

    wanted = zip(
        work.seqs, work.query_starts, work.num_queries, work.kv_starts, work.kv_ends, work.partials, strict=True
    )
    assert sorted(map(tuple, [*decode[:, :6], *prefill[:, :6]])) == sorted(wanted)
    assert (decode[:, 2] * group_size <= 16).all()
    assert (prefill[:, 2] * group_size > 16).all()
    assert (prefill[:, 2] * group_size <= 64).all()
    assert (np.diff(prefill[:, 4] - prefill[:, 3]) <= 0).all()
    assert len(units) == packed.num_units + 1
    assert units[0] == 0
    assert units[-1] == len(decode)
    assert (np.diff(units) >= 0).all()
    for item in decode[decode[:, 5] >= 0]:
        parts = decode[(decode[:, 6] == item[6]) & (decode[:, 5] >= 0)]
        assert len(parts) == item[7]
        assert parts[:, 5].tolist() == [item[6] + i * item[2] for i in range(item[7])]
        assert (np.diff(parts[:, 3]) > 0).all()
