"""The worker that a request is going to, while it is on its way: others of its prompt follow it from now on."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from scheduler.engine import Engine
from scheduler.live_request import LiveRequest


class Place:
    """Kept while its `with` lasts; whoever opens the request at its engine within is counted there without a gap."""

    def __init__(self, live: LiveRequest, choose: Callable[[LiveRequest], Engine | None]) -> None:
        self._live = live
        self._choose = choose
        self._sequence = live.choices[0].sequence  # its prompt is everybody's
        self._engine: Engine | None = None

    def engine(self) -> Engine | None:
        """The engine to open it at, the same as long as that is not lost; None where there is none."""
        if self._engine is None or self._engine.is_lost:
            self._leave()
            self._engine = self._choose(self._live)
            if self._engine is not None:
                self._engine.planner.expect(self._sequence)
        return self._engine

    def _leave(self) -> None:
        if self._engine is not None:
            self._engine.planner.expect_no_more(self._sequence)
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
