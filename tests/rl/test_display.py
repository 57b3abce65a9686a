"""The terminal: plain lines where nobody watches, a live panel where somebody does, never an exception."""

import io
import os
import pty
import subprocess
import sys
import threading

import pytest

from rl.report.display import Display
from rl.report.safe_stream import SafeStream, sparkline

VALUES = {
    "reward/mean": 0.5,
    "groups/without_spread": 0.125,
    "completion/length_mean": 182.3,
    "policy/entropy": 0.31,
    "tokens/per_second": 5310.2,
    "time/step": 3.21,
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RANK", "NO_COLOR", "CI", "TERM"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_one_line_per_step():
    stream = io.StringIO()
    with Display(20, stream) as display:
        display.step(1, VALUES)
        display.heldout(1, 0.531, 0.482, 0.579)
    assert stream.getvalue() == (
        "step 1/20  reward 0.5  no spread 12.5 %  length 182  entropy 0.31  tokens/s 5,310  took 3.2 s\n"
        "held-out 53.1 % [48.2, 57.9] at step 1\n"
    )


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("CI", "true"), ("TERM", "dumb")])
def test_a_terminal_that_wants_no_colours_gets_plain_lines(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    stream = Terminal()
    with Display(20, stream) as display:
        display.step(1, {"reward/mean": 0.5})
        display.warn("low")
    assert stream.getvalue() == "step 1/20  reward 0.5\nwarning: low\n"


def test_a_terminal_gets_a_live_panel_with_phase_and_numbers():
    stream = Terminal()
    with Display(20, stream) as display:
        display.heldout(0, 0.4, 0.35, 0.45)
        display.step(1, VALUES)
        with display.phase("sampling completions"):
            display._live.refresh()
    text = stream.getvalue()
    for part in (
        "step 1/20",
        "sampling completions 0 s",
        "5,310",
        "12.5 %",
        "40.0 % [35.0, 45.0] at step 0",
        "\x1b[",
    ):
        assert part in text


def test_a_long_phase_says_what_it_waits_for():
    lines = Lines()
    with Display(20, lines, notice_s=0.01) as display:
        display.step(3, {})
        with display.phase("the engine at http://127.0.0.1:8000"):
            assert lines.seen("waiting for the engine at http://127.0.0.1:8000").wait(timeout=30)
    assert "(after step 3)" in lines.getvalue()
    assert "the engine at http://127.0.0.1:8000: done after" in lines.getvalue()


def test_a_short_phase_says_nothing():
    stream = io.StringIO()
    with Display(20, stream) as display, display.phase("sync"):
        pass
    assert stream.getvalue() == ""


def test_phases_nest_and_keep_their_seconds_after_an_error():
    display = Display(1, io.StringIO())
    with pytest.raises(KeyError), display.phase("outer") as outer, display.phase("inner") as inner:
        raise KeyError("boom")
    assert outer.seconds >= inner.seconds >= 0
    assert inner.seconds == inner.seconds  # stands still once it is over
    assert display._phases == []


HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]x[/red] :warning: \u202etxt\r\x9b31m\nstep 99/100  reward 1.0"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "live"])
def test_hostile_text_cannot_steer_the_terminal(stream):
    with Display(20, stream) as display:
        display.note(HOSTILE)
        display.warn(HOSTILE)
    text = stream.getvalue()
    assert "[red]x[/red] :warning: txt" in text  # rich markup and emoji codes stay what they are
    for bad in ("\x1b[2J", "\x1b]0", "owned", "\u202e", "\x9b", "\x07"):
        assert bad not in text
    assert "\n    step 99/100" in text and "\nstep 99" not in text  # a forged line is indented


def test_other_processes_print_nothing_and_still_time_their_phases(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stream = Terminal()
    with Display(20, stream) as display:
        with display.phase("sample") as phase:
            pass
        display.step(1, VALUES)
        display.note("x")
        display.warn("x")
        display.heldout(1, 0.5, 0.4, 0.6)
    assert stream.getvalue() == ""
    assert phase.seconds > 0


def test_unknown_characters_become_question_marks():
    raw = io.BytesIO()
    with Display(20, io.TextIOWrapper(raw, encoding="ascii", write_through=True)) as display:
        display.note("naïve 数")
    assert raw.getvalue() == b"na?ve ?\n"


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "broken pipe"])
def test_a_dead_stream_is_silence(closed):
    stream = io.StringIO() if closed else Broken()
    if closed:
        stream.close()
    with Display(20, stream) as display:
        display.step(1, VALUES)
        display.note("x")


def test_a_reader_that_leaves_does_not_fail_the_program():
    code = (
        "import sys; sys.stdin.readline()\n"
        "from rl.report.display import Display\n"
        "with Display(9) as d:\n"
        "    for s in range(1, 9): d.step(s, {'reward/mean': 0.5})\n"
        "print('still here', file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # nobody reads
    _, errors = process.stdin.write("go\n"), ""
    process.stdin.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), errors) == (0, "still here\n")


def test_a_real_terminal_sees_the_panel():
    master, slave = pty.openpty()
    code = (
        "from rl.report.display import Display\n"
        "with Display(9) as d: d.step(3, {'reward/mean': 0.5, 'tokens/per_second': 1234.0})\n"
    )
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, env=environment)
    os.close(slave)
    output = b""
    while chunk := _read(master):
        output += chunk
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert b"step 3/9" in output and b"1,234" in output and b"\x1b[" in output


def test_sparkline_spans_the_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, float("nan"), 2]) == "▁ █"
    assert sparkline([5, 5]) == "▄▄"
    assert sparkline([]) == ""
    assert sparkline([0, 7], "ascii") == ".@"


def test_a_stream_with_an_unknown_encoding_still_writes():
    class Odd(io.StringIO):
        encoding = "no-such-encoding"

    stream = Odd()
    SafeStream(stream).write("é!")
    assert stream.getvalue() == "?!"


def _read(descriptor):
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux reports EIO once the other side is closed
        return b""


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    flush = write


class Lines(io.StringIO):
    """Tells when a text was written."""

    def __init__(self):
        super().__init__()
        self.wanted: list[tuple[str, threading.Event]] = []

    def seen(self, text):
        event = threading.Event()
        self.wanted.append((text, event))
        self.write("")
        return event

    def write(self, text):
        count = super().write(text)
        for wanted, event in self.wanted:
            if wanted in self.getvalue():
                event.set()
        return count


def test_notes_and_warnings_hide_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "verysecretvalue")
    stream = io.StringIO()
    with Display(1, stream) as display:
        display.note("read from https://me:hunter2@host/x")
        display.warn("refused: verysecretvalue\nstep 1/1")
    assert stream.getvalue() == "read from https://***@host/x\nwarning: refused: ***\n    step 1/1\n"
