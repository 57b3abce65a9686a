"""The observer of a run: terminal, trackers, report, and a watchdog that warns once of what is broken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl.report.display import Display
from rl.report.live import LiveReport
from rl.report.trackers import Trackers
from rl.report.verdict import Watch


class RunObserver:
    """Reports to `display` and the trackers of `config`. What `Watch` calls broken becomes a warning, once;
    the verdict is shown when it changes.

    Args:
        judged: whether the verdict's rules apply to this kind of run.
        each_step: called with the number of each step that ended, before the report looks for its files.
    """

    def __init__(
        self,
        display: Display,
        config: Any,
        *,
        is_main: bool,
        judged: bool = True,
        each_step: Callable[[int], object] = int,
    ) -> None:
        self._each_step = each_step
        self.display, self.note, self.phase = display, display.note, display.phase
        names, settings = config.trackers if is_main else [], config.model_dump(mode="json")
        self.trackers = Trackers(names, run_dir=config.run_dir, config=settings, warn=display.warn)
        self.report = LiveReport(config.run_dir) if is_main else None
        self._watch = Watch() if judged else None
        self._told: set[str] = set()
        self._level = "Healthy"

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._each_step(step)
        self.trackers.log(step, values)
        self.display.step(step, values)
        if self.report is not None:
            self.report.tick()
        for finding in self._watch.broken(step, values) if self._watch else ():
            self.warn(str(finding), topic=finding.metric)
        if self._watch and self._watch.verdict.level != self._level:
            self._level = self._watch.verdict.level
            self.note(f"verdict: {self._watch.verdict.headline}")

    def heldout(self, step: int, accuracy: float, low: float, high: float) -> None:
        self.display.heldout(step, accuracy, low, high)
        numbers = {"accuracy": accuracy, "low": low, "high": high}
        self.trackers.log(step, {f"heldout/{name}": value for name, value in numbers.items()})

    def warn(self, text: str, *, topic: str = "") -> None:
        if topic not in self._told:
            self.display.warn(text)
        self._told |= {topic} - {""}

    def goes_on(self, rows: Sequence[dict[str, Any]]) -> None:
        """Gives the watchdog the rows that earlier processes of the run have logged."""
        if self._watch:
            self._watch.recall(rows)

    def close(self) -> None:
        """Lets the trackers finish; safe to call twice."""
        self.trackers.close()
