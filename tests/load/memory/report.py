"""Tables of what was measured, and which goals were met; a missed goal says what limits it."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from tests.load.memory.contenders import DENSE_LONGEST, DENSE_POWER, PAGED
from tests.load.memory.outcome import Outcome
from tests.load.memory.sharing import Saving

Runs = Mapping[str, Sequence[Outcome]]
"""By contender, its rounds over one trace."""

MAX_WASTED = {"ShareGPT": 0.04}
"""By trace: requests as short as Alpaca's do not fill blocks well, whoever shares them out."""
MIN_SPEED_UP = 2.0
MIN_NUM_HELD = 20

HEADS = (
    *("", "wasted", "internal", "of it behind last tokens", "not filled yet", "holes"),
    *("memory with tokens while requests wait", "most requests at once", "on average", "largest step"),
    *("tokens a step", "tokens/s", "over dense"),
)


def total(rounds: Sequence[Outcome]) -> Outcome:
    """All rounds as one."""
    return sum(rounds, Outcome())


def speed(rounds: Sequence[Outcome]) -> float:
    """Output tokens per second, the median of the rounds."""
    return statistics.median(outcome.tokens_per_s for outcome in rounds)


def show(trace: str, runs: Runs) -> Iterator[str]:
    """A line per contender. Shares of waste are of memory taken, the share with tokens is of all memory."""
    yield " | ".join((trace, *HEADS[1:]))
    yield " | ".join(["---"] * len(HEADS))
    for name, rounds in runs.items():
        whole = total(rounds)
        parts = [whole.use.share(part) for part in ("internal", "tail", "reserved", "external")]
        waited_for = whole.use_when_waited_for
        in_tokens = f"{waited_for.tokens / waited_for.whole:.0%}" if waited_for.whole else "nobody waits"
        yield " | ".join(
            (
                name,
                *(f"{100 * share:.1f} %" for share in (whole.use.wasted, *parts)),
                in_tokens,
                *(str(whole.max_num_held), f"{whole.mean_num_held:.1f}", str(whole.max_num_rows)),
                *(
                    f"{whole.tokens_per_step:.1f}",
                    f"{speed(rounds):.0f}",
                    f"{speed(rounds) / speed(runs[DENSE_LONGEST]):.2f}x",
                ),
            )
        )


def judge(trace: str, runs: Runs) -> Iterator[str]:
    """A line per goal."""
    ours, longest = total(runs[PAGED]), total(runs[DENSE_LONGEST])
    wasted, most_wasted = ours.use.wasted, MAX_WASTED.get(trace)
    goal = f", goal under {100 * most_wasted:.0f} %: {verdict(wasted < most_wasted)}" if most_wasted else ""
    yield (
        f"{trace}: {100 * wasted:.1f} % wasted{goal}; no blocks of this size can do with less than "
        f"{100 * ours.use.least_wasted:.1f} % for these tokens, the rest is taken ahead of need"
    )
    most = ours.max_num_held
    yield (
        f"{trace}: {most} requests at once where {longest.max_num_held} dense ones fit, goal {MIN_NUM_HELD}: "
        f"{verdict(most >= MIN_NUM_HELD)}; {ours.mean_num_held:.1f} on average against {longest.mean_num_held:.1f}"
    )
    for name in (DENSE_LONGEST, DENSE_POWER):
        other, ratio = total(runs[name]), speed(runs[PAGED]) / speed(runs[name])
        yield (
            f"{trace}: {ratio:.2f}x the throughput of '{name}', goal {MIN_SPEED_UP:.0f} to 4: "
            f"{verdict(ratio >= MIN_SPEED_UP)}; {ours.tokens_per_step / other.tokens_per_step:.1f} times the tokens a "
            f"step, in steps that take {ours.step_s / other.step_s:.1f} times as long"
        )


def verdict(is_met: bool) -> str:
    """In a word."""
    return "met" if is_met else "MISSED"


def show_savings(savings: Sequence[Saving]) -> Iterator[str]:
    """A line per case."""
    yield "memory saved by sharing | tokens in all tables | stored | blocks saved"
    yield " | ".join(["---"] * 4)
    for saving in savings:
        yield f"{saving.name} | {saving.num_read} | {saving.num_stored} | {100 * saving.saved:.1f} %"
