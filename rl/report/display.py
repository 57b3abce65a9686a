"""What a run shows in a terminal: one live panel, or plain lines where nobody watches (a file, CI, NO_COLOR).

It never stops the run: a closed pipe or a poor encoding spoils the display, nothing else. Text of prompts,
completions and graders is hostile: escape sequences, control and bidi characters are removed from it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rl.report.safe_stream import SafeStream, is_watched, own_stdout, settle, sparkline
from rl.store.metrics import show_seconds, show_value, shown_metric
from rl.store.redact import safe_text, strip_controls

_HISTORY = 40  # values in a sparkline
_PLAIN = (
    ("reward", "reward/mean"),
    ("bound", "diffusion/bound"),
    ("loss", "sft/loss"),
    ("no spread", "groups/without_spread"),
    ("length", "completion/length_mean"),
    ("cut", "completion/truncated_share"),
    ("entropy", "policy/entropy"),
    ("KL", "policy/kl"),
    ("teacher KL", "teacher/kl"),
    ("mismatch", "sampler/mismatch_kl"),
    ("tokens/s", "tokens/per_second"),
    ("tokens/s", "diffusion/tokens_per_second"),
    ("took", "time/step"),
)


class Phase:
    """What the run does or waits for. `seconds` counts while the phase is open and stays fixed afterwards."""

    def __init__(self, name: str, first_notice: float) -> None:
        self.name = name
        self.next_notice = first_notice
        self.was_noticed = False
        self._begin = time.monotonic()
        self._end: float | None = None

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self._end is None else self._end) - self._begin

    def stop(self) -> None:
        self._end = time.monotonic()


class Display:
    """Progress of a run of `total_steps`; a context manager.

    Args:
        stream: where to write, a text stream; default sys.stdout.
        is_main: other processes show nothing but still time their phases; default: RANK is 0 or unset.
        notice_s: in plain mode a line reports a phase that lasts this long, then twice as long, and so on.
    """

    def __init__(
        self,
        total_steps: int,
        stream: Any = None,
        *,
        is_main: bool | None = None,
        notice_s: float = 60.0,
    ) -> None:
        self._total = total_steps
        self._is_stdout = stream is None
        self._stream = SafeStream(own_stdout() if stream is None else stream)
        self._is_main = os.environ.get("RANK", "0") == "0" if is_main is None else is_main
        self._is_live = self._is_main and is_watched(self._stream)
        self._notice_s = notice_s
        self._phases: list[Phase] = []
        self._step: int | None = None
        self._values: dict[str, float] = {}
        self._heldout: tuple[int, float, str] | None = None
        self._heldout_before: float | None = None
        self._rewards: deque[float] = deque(maxlen=_HISTORY)
        self._pace: deque[tuple[float, int]] = deque(maxlen=21)
        self._warning = ""
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._watcher: threading.Thread | None = None
        self._live: Live | None = None
        self._held: list[tuple[str, str]] | None = None

    def __enter__(self) -> Display:
        if self._is_live:
            file: Any = self._stream
            self._live = Live(
                console=Console(file=file, markup=False, emoji=False, highlight=False),
                get_renderable=self._render,
                refresh_per_second=4,
                redirect_stdout=self._is_stdout,
                redirect_stderr=self._is_stdout,
            )
            self._live.start()
        elif self._is_main:
            self._watcher = threading.Thread(target=self._watch, name="display", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._watcher is not None:
            self._watcher.join(timeout=5)
            self._watcher = None
        self.head("")
        if self._is_stdout:
            settle(self._stream.inner)

    def hold(self) -> None:
        """Holds notes and warnings back until `head` has given a log its first line."""
        self._held = []

    def head(self, text: str) -> None:
        """Prints the first line, and after it what was held back."""
        held, self._held = self._held, None
        for line, style in [(safe_text(text), "bold")] * bool(text) + (held or []):
            self._print(line, style)

    def say(self, text: str) -> None:
        """Prints a line that is not held back."""
        self._print(safe_text(text), at_once=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Shows what the run does or waits for, and for how long; phases nest. `Phase` has the seconds."""
        phase = Phase(_one_line(name), self._notice_s)
        with self._lock:
            self._phases.append(phase)
        try:
            yield phase
        finally:
            phase.stop()
            with self._lock:
                self._phases.remove(phase)
            if phase.was_noticed:
                self._print(f"{phase.name}: done after {show_seconds(phase.seconds)}", at_once=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step; `step` is how many of `total_steps` are done."""
        with self._lock:
            self._step = step
            self._values = dict(values)
            self._pace.append((time.monotonic(), step))
            if "reward/mean" in values:
                self._rewards.append(values["reward/mean"])
        if not self._is_live:
            self._print(self._line())

    def heldout(
        self, step: int, accuracy: float, low: float, high: float, *, from_before: bool = False
    ) -> None:
        """Shows an evaluation on held-out prompts with its interval; remembers the one at step 0."""
        with self._lock:
            self._heldout = step, accuracy, f" [{100 * low:.1f}, {100 * high:.1f}]"
            self._heldout_before = accuracy if step == 0 else self._heldout_before
        if not self._is_live and not from_before:
            self._print(f"held-out {self._heldout_text(*self._heldout)}")

    def note(self, text: str) -> None:
        """Shows text, above the panel in a terminal. Later lines are indented: none can imitate ours."""
        self._print(safe_text(text))

    def warn(self, text: str) -> None:
        """Shows a warning, and keeps the latest one in the panel."""
        with self._lock:
            self._warning = safe_text(text)
        self._print(f"warning: {self._warning}", style="yellow")

    @property
    def seconds_left(self) -> float | None:
        """Seconds for the remaining steps at the pace of the last twenty; None before the second step."""
        with self._lock:
            if len(self._pace) < 2 or self._step is None:
                return None
            (begin, first), (end, last) = self._pace[0], self._pace[-1]
            if last <= first:
                return None
            left = (end - begin) / (last - first) * (self._total - self._step)
            return max(0.0, left - (time.monotonic() - end))

    def _print(self, text: str, style: str = "", *, at_once: bool = False) -> None:
        """Prints a line on the main process; lines on hold wait for `head`, unless `at_once`."""
        if not self._is_main:
            return
        if self._held is not None and not at_once:
            self._held.append((text, style))
            return
        if self._live is not None:
            self._live.console.print(Text(text, style=style))
            return
        self._stream.write(text + "\n")
        self._stream.flush()

    def _line(self) -> str:
        parts = [f"step {self._step}/{self._total}"]
        parts += [
            f"{label} {show_value(name, self._values[name])}"
            for label, name in _PLAIN
            if name in self._values
        ]
        left = self.seconds_left
        return "  ".join([*parts, f"left {show_seconds(left)}"] if left is not None else parts)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._notice_s / 4)):
            with self._lock:
                phase = self._phases[-1] if self._phases else None
            if phase is None or phase.seconds < phase.next_notice:
                continue
            phase.was_noticed = True
            where = f" (after step {self._step})" if self._step is not None else ""
            self._print(f"waiting for {phase.name}: {show_seconds(phase.seconds)}{where}", at_once=True)
            while phase.next_notice <= phase.seconds:
                phase.next_notice *= 2

    def _render(self) -> Group:
        with self._lock:
            rows = Table.grid(padding=(0, 2), expand=True)
            rows.add_column(style="dim", no_wrap=True, min_width=11)
            rows.add_column(ratio=1)
            for label, content in self._panel_rows():
                rows.add_row(label, content)
            return Group(self._head(), rows)

    def _head(self) -> Table:
        done = self._step or 0
        left = self.seconds_left
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            Text(f"step {done}/{self._total}", style="bold"),
            ProgressBar(total=max(1, self._total), completed=done),
            Text(f"{show_seconds(left)} left" if left is not None else "", style="bold"),
        )
        return head

    def _panel_rows(self) -> Iterator[tuple[str, Text]]:
        phase = self._phases[-1] if self._phases else None
        if phase is not None:
            slow = phase.seconds >= self._notice_s
            age = Text(f"{phase.name} {int(phase.seconds)} s", "yellow" if slow else "cyan")
            yield ("waiting for" if slow else "now"), age
        if self._rewards:
            reward = self._numbers(
                ("", "reward/mean"), ("std", "reward/std"), ("no spread", "groups/without_spread")
            )
            yield "reward", Text.assemble(sparkline(list(self._rewards), self._stream.encoding), "  ", reward)
        if self._heldout is not None:
            yield "held-out", Text(self._heldout_text(*self._heldout))
        for label, names in (
            ("bound", (("", "diffusion/bound"), ("scored", "diffusion/scored_share"))),
            ("length", (("", "completion/length_mean"), ("cut", "completion/truncated_share"))),
            (
                "policy",
                (("entropy", "policy/entropy"), ("KL", "policy/kl"), ("gradient", "policy/grad_norm")),
            ),
            ("sampler", (("mismatch KL", "sampler/mismatch_kl"), ("gap", "sampler/logprob_gap_mean"))),
            (
                "speed",
                (("", "tokens/per_second"), ("", "diffusion/tokens_per_second"), ("a step", "time/step")),
            ),
        ):
            if (numbers := self._numbers(*names)).plain:
                yield label, numbers
        if self._warning:
            yield "warning", Text(self._warning, style="yellow", overflow="ellipsis", no_wrap=True)

    def _heldout_text(self, step: int, accuracy: float, interval: str) -> str:
        before = self._heldout_before
        begin = f", from {100 * before:.1f} %" if before is not None and step > 0 else ""
        return f"{100 * accuracy:.1f} %{interval} at step {step}{begin}"

    def _numbers(self, *pairs: tuple[str, str]) -> Text:
        """The values in one line: label, number, unit; yellow outside the healthy range, red if broken."""
        parts: list[Any] = []
        for label, name in pairs:
            if (value := self._values.get(name)) is None:
                continue
            metric = shown_metric(name)
            style = "red" if metric.is_broken(value) else "" if metric.is_healthy(value) else "yellow"
            unit = metric.unit if metric.unit in ("tokens", "tokens/s") else ""
            parts += ["   "] if parts else []
            parts += [
                (f"{label} " if label else "", "dim"),
                (show_value(name, value), style),
                f" {unit}" if unit else "",
            ]
        return Text.assemble(*parts)


def _one_line(text: str) -> str:
    return " ".join(strip_controls(text).split())
