"""Sends metrics to tensorboard, wandb or trackio, through accelerate. A tracker may fail; the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.config.read import flatten
from rl.store.redact import redact


class Trackers:
    """The trackers of a run. One that raises is reported once through `warn` and dropped.

    Args:
        names: names of accelerate's trackers, such as "tensorboard".
        config: stored with the run, without secrets, under keys such as train.steps; lists become text.
        warn: shows one line to the user.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        run_dir: str | Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self.active: dict[str, Any] = {}  # name -> a tracker that still works
        plain = bool | int | float | str
        settings = {k: v if isinstance(v, plain) else str(v) for k, v in flatten(redact(config)).items()}
        for name in names:
            self._guarded(name, "did not start", lambda name=name: self._start(name, Path(run_dir), settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends one row without its non-finite values, which trackers draw as zeros or fail on."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name, tracker in list(self.active.items()):
            self._guarded(name, "failed", lambda tracker=tracker: tracker.log(finite, step=step))

    def close(self) -> None:
        """Lets every tracker finish; safe to call twice."""
        for name, tracker in list(self.active.items()):
            self._guarded(name, "did not finish", tracker.finish)
        self.active.clear()

    def _start(self, name: str, run_dir: Path, settings: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"accelerate has no tracker {name!r}; it has {', '.join(LOGGER_TYPE_TO_CLASS)}")
        make: Any = LOGGER_TYPE_TO_CLASS[name]
        if make.requires_logging_directory:
            tracker = make(name, run_dir)
        else:
            tracker = make("cohort", name=run_dir.name)
        tracker.start()
        self.active[name] = tracker
        tracker.store_init_configuration(settings)

    def _guarded(self, name: str, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        # Third-party code that uses disks and networks may raise anything; training must go on.
        except Exception as error:
            self.active.pop(name, None)
            reason = redact(" ".join(str(error).split()))[:300]
            if isinstance(error, ImportError):
                reason += f'; pip install "cohort-rl[{name}]" brings it'
            self._warn(
                f"tracker {name} {what} and is left out from now on ({type(error).__name__}: {reason}); "
                "metrics.jsonl is still written, and the report is made from it"
            )
