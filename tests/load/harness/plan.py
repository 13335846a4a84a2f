"""A run's plan: which conversations there are, when each is due, and which process has it. Pure.

Every process makes the whole plan from the settings and takes its share of it: nobody deals out work during the run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from tests.load.harness.arrivals import DEFAULT_NUM_PROMPTS, Times, due_times_s
from tests.load.harness.settings import Settings
from tests.load.harness.trace import read_trace
from tests.load.harness.workload import ServedModel, Workload, make_workload


@dataclass(frozen=True, slots=True)
class Plan:
    """Of a whole run."""

    workload: Workload
    due_s: Times | None
    """Of each conversation, seconds from the start; None: a closed loop."""
    num_conversations: int | None
    """None: they go on until the time is over."""


@dataclass(frozen=True, slots=True)
class Share:
    """A process's part: conversations `number`, `number + count`, ..."""

    number: int = 0
    count: int = 1

    def indexes(self, plan: Plan) -> Iterator[int]:
        """Which conversations are its own."""
        if plan.num_conversations is None:
            return count(self.number, self.count)
        return iter(range(self.number, plan.num_conversations, self.count))

    def part_of(self, total: int) -> int:
        """Its part of so many."""
        return total // self.count + (self.number < total % self.count)


def make_plan(settings: Settings, model: ServedModel) -> Plan:
    """The plan that any process makes of the same settings. Raises LoadError."""
    pace = settings.pace
    due_s: Times | None
    if settings.dataset.name == "timed_trace" and settings.dataset.self_timed:
        assert settings.dataset.path is not None
        due_s = np.array([row.due_s for row in read_trace(settings.dataset.path)][: pace.num_prompts])
    else:
        due_s = due_times_s(pace, settings.seed)
    if due_s is not None:
        num_conversations: int | None = len(due_s)
    elif pace.duration_s is None:
        num_conversations = pace.num_prompts or DEFAULT_NUM_PROMPTS
    else:
        num_conversations = None
    num_drawn = num_conversations or pace.num_prompts or DEFAULT_NUM_PROMPTS
    return Plan(make_workload(settings, model, num_drawn), due_s, num_conversations)
