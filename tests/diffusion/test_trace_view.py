"""The order of writing in a terminal and in the report; what a model writes cannot leave its element."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from recipes.cli import main as cohort
from recipes.cli.denoising import denoising_frames
from rl.report.report import build_report
from rl.report.traces import denoising_html
from rl.store.ledger import Ledger
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from tests.calling import trace_of


def completion(pieces=("The ", "answer ", "is ", "42"), steps=(1, 3, 0, 2), tail=2, logprobs=()):
    n, end = len(pieces), max(steps) + 1
    trace = trace_of([*steps, *[end] * tail], [9] * tail, end, list(pieces))
    spans = [VersionSpan(0, n)]
    text = "".join(pieces)
    return Completion(list(range(n)), list(logprobs), [True] * n, "stop", spans, text, facts={"trace": trace})


def terminal(found) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(found)
    return console.file.getvalue()


def test_frames_show_what_was_there_after_a_step():
    out = terminal(denoising_frames(completion(), num_frames=4))
    blocks = out.split("after step ")[1:]
    assert blocks[0].startswith("1 of 4\n··· ······ is ··")
    assert blocks[1].startswith("2 of 4\nThe ······ is ··")
    assert blocks[2].startswith("3 of 4\nThe ······ is 42")
    assert blocks[3].startswith("4 of 4\nThe answer is 42")
    assert len(terminal(denoising_frames(completion(), num_frames=40)).split("after step")) == 5


def test_the_fragment_says_when_each_token_came():
    page = denoising_html(completion(logprobs=[-0.5, -1.25, -2.0, -0.01]), "step 3")
    assert '<span style="--s:1;--c:#f1731d" title="step 2 of 4, log-prob -0.50">The </span>' in page
    assert 'title="step 4 of 4, log-prob -1.25">answer </span>' in page
    assert "step 3 4 steps for 4 of 6 columns" in page
    assert re.sub(r"<style>.*?</style>|<[^>]*>", "", page, flags=re.DOTALL).endswith("The answer is 42")


HOSTILE = ("</span><script>alert(1)</script>", '" onmouseover="x', "\x1b[31mred\u202e", "&lt;")


def test_hostile_text_stays_text():
    page = denoising_html(completion(HOSTILE), "</figcaption><script>")
    assert "<script" not in page and page.count("</figcaption>") == 1 and page.count("</span>") == 4
    assert "&quot; onmouseover=&quot;x" in page and "⟨U+202E⟩" in page and "&amp;lt;" in page
    out = terminal(denoising_frames(completion(HOSTILE), num_frames=1))
    assert "\x1b" not in out and "\u202e" not in out and "red" in out


def test_a_secret_across_tokens_is_hidden():
    page = denoising_html(completion(("hf_abcdefgh", "ijklmnopqrst", " is", " it")))
    assert "***" in page and "ijkl" not in page and "abcdefgh" not in page


def test_report_and_command_show_the_first_and_the_last_step(tmp_path, capsys):
    ledger = Ledger(tmp_path)
    for step in range(3):
        pieces = ("step ", f"number {step} ", "is ", "over")
        group = Group(Prompt("p", "What?", (1, 2)), [completion(pieces), completion(("a", "b", "c", "d"))])
        scored = ScoredGroup(group, [Reward(1.0), Reward(None)])
        ledger.write(step, [scored], cursor_before=step, cursor_after=step + 1, policy_version=step)
    page = build_report(tmp_path).read_text()
    assert page.count('<figure class="denoising"') == 4
    assert "number 0 " in page and "number 2 " in page
    assert cohort(["denoising", str(tmp_path), "--frames", "2"]) == 0
    out = capsys.readouterr().out
    assert "step 3, prompt 'p', reward 1" in out and "reward none" in out
    assert "number 2" in out and "number 1" not in out


def test_runs_without_traces_say_so(tmp_path, capsys):
    plain = completion()
    plain.facts = {}
    with pytest.raises(ValueError, match="not sampled by a masked diffusion model"):
        denoising_html(plain)
    scored = ScoredGroup(Group(Prompt("p", "", (1,)), [plain]), [Reward(1.0)])
    Ledger(tmp_path).write(0, [scored], cursor_before=0, cursor_after=1, policy_version=0)
    assert '<figure class="denoising"' not in build_report(tmp_path).read_text()
    assert cohort(["denoising", str(tmp_path)]) == 1
    assert "no completion of a masked diffusion model" in capsys.readouterr().err
