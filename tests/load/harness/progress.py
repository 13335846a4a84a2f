"""How a run goes, while it goes: a table that is drawn anew on a terminal, a line now and then elsewhere. On stderr."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tests.load.harness.backend import ServerSample
from tests.load.harness.generator import Counts

LINE_INTERVAL_S = 2.0


class Progress:
    """Shows what run_once tells it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._next_line_s = 0.0

    def begin(self, title: str) -> None:
        """What follows belongs to this."""
        self._title = title
        self._next_line_s = time.monotonic() + LINE_INTERVAL_S
        if self._live is None:
            self._console.print(title, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, counts: Counts, sample: ServerSample | None, elapsed_s: float) -> None:
        """See run.Show."""
        if self._live is not None:
            self._live.update(_table(self._title, counts, sample, elapsed_s))
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_INTERVAL_S
            words = ", ".join(f"{value} {name}" for name, value in _rows(counts, sample, elapsed_s))
            self._console.print(words, highlight=False, soft_wrap=True)


def _rows(counts: Counts, sample: ServerSample | None, elapsed_s: float) -> list[tuple[str, str]]:
    rows = [
        ("seconds", f"{max(0.0, elapsed_s):.0f}"),
        ("sent", str(counts.num_sent)),
        ("under way", str(counts.num_running)),
        ("completed", str(counts.num_completed)),
        ("left", str(counts.num_left)),
        ("failed", str(counts.num_failed)),
        ("output tokens", str(counts.num_output_tokens)),
        ("ms late at worst", f"{1e3 * counts.worst_late_s:.0f}"),
    ]
    if sample is not None:
        blocks = sample.blocks
        rows += [
            ("running there", str(sample.num_running)),
            ("waiting there", str(sample.num_waiting)),
            ("blocks referenced", f"{blocks.get('referenced', 0)} of {sum(blocks.values())}"),
        ]
    return rows


def _table(title: str, counts: Counts, sample: ServerSample | None, elapsed_s: float) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in _rows(counts, sample, elapsed_s):
        table.add_row(name, value)
    return table
