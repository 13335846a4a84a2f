"""The peak that a batch can reach, against growing it token by token; and what is expected of outputs."""

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.admission import MIN_HISTORY, OutputLengths, peak_blocks
from scheduler.sequence import Sequence, SequenceLimits
from tests.unit.planner_sim import Arrival, SimLimits, Simulation


def sequence(num_tokens: int, max_output_tokens: int, num_outputs: int = 0, num_shared_blocks: int = 0) -> Sequence:
    limits = SequenceLimits(max_output_tokens, frozenset((0,)), ignores_eos=False)
    found = Sequence(1, "r", 0, [1] * num_tokens, num_tokens - num_outputs, limits, b"")
    found.num_shared_blocks = num_shared_blocks
    return found


def grown(sequences: list[Sequence], block_size: int) -> int:
    """The peak by growing all at once, a token a step, each until its limit; its blocks are back a step later."""
    peak = 0
    for step in range(max(s.limits.max_output_tokens - s.num_output_tokens for s in sequences) + 1):
        held = 0
        for s in sequences:
            if s.limits.max_output_tokens - s.num_output_tokens >= step:
                alone = max(0, len(s.token_ids) - s.num_shared_blocks * block_size)
                held += -(-(alone + step) // block_size)
        peak = max(peak, held)
    return peak


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            sequence,
            num_tokens=st.integers(9, 70),
            max_output_tokens=st.integers(9, 40),
            num_outputs=st.integers(0, 8),
            num_shared_blocks=st.integers(0, 3),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([1, 4, 16]),
)
def test_the_peak_is_the_one_that_growing_them_shows(sequences: list[Sequence], block_size: int) -> None:
    assert peak_blocks(sequences, OutputLengths(), block_size) == grown(sequences, block_size)


def test_sequences_in_lockstep_are_no_reason_to_preempt() -> None:
    """Equal prompts cross the borders of their blocks together; nothing averages out."""
    limits = SimLimits(20, 16, max_num_seqs=64, max_num_batched_tokens=256)
    simulation = Simulation(limits, [Arrival((1 + i,) * 16, 24, ignores_eos=True) for i in range(40)]).run()
    assert simulation.planner.counters.num_preemptions == 0


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=MIN_HISTORY, max_size=80), st.integers(0, 60), st.integers(61, 99))
def test_what_is_expected_is_the_mean_of_those_that_went_on_longer(kept: list[int], so_far: int, most: int) -> None:
    lengths = OutputLengths(num_kept=40)
    for length in kept:
        lengths.add(length)
    longer = [length for length in kept[-40:] if length > so_far]
    expected = min(most - so_far, sum(longer) // len(longer) - so_far + 1) if longer else most - so_far
    assert lengths.expected_remaining(sequence(so_far + 5, most, so_far)) == expected


def test_only_the_limit_counts_without_a_history_or_where_no_stop_ends_it() -> None:
    lengths = OutputLengths()
    for _ in range(MIN_HISTORY - 1):
        lengths.add(2)
    assert lengths.expected_remaining(sequence(5, 30)) == 30
    lengths.add(2)
    assert lengths.expected_remaining(sequence(5, 30)) == 3
    endless = sequence(5, 30)
    endless.limits = SequenceLimits(30, frozenset(), ignores_eos=True)
    assert lengths.expected_remaining(endless) == 30
