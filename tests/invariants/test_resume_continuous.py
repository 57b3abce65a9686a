"""Law 6 with sampling ahead: killed anywhere and started again, what holds and what does not.

What the ledger has is repeated bit for bit; what was in flight is sampled again, by newer weights. So every
prompt is consumed once and in order, and no step is trained on two different batches; the weights of steps
after the kill are not those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rl.store.ledger import Ledger
from rl.store.rows import read_rows
from rl.types import Prompt
from rollout.prompts import PromptStream

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(600)
STEPS, SIZE = 6, 4
# Phase and entry to kill in -> steps that the ledger holds by then for certain; a step samples at most twice.
# The record of a step is written while it trains.
KILLS = {
    "sample:5": 2,
    "score:5": 2,
    "train:4": 3,
    "save:4": 4,
    "sync:5": 4,
    "eval:2": 3,
    "term-train:2": 2,
}
NAMES = [kill.partition(":")[0] for kill in KILLS]
HELD = dict(zip(NAMES, KILLS.values(), strict=True))


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    out = tmp_path_factory.mktemp("runs")
    data, heldout = out / "data.jsonl", out / "heldout.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is w{i} + w{i + 1} ?"}) + "\n" for i in range(10)))
    heldout.write_text("".join(json.dumps({"prompt": f"What is w{i} ?"}) + "\n" for i in range(40, 46)))
    config = {
        "model": {"name": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"source": str(data), "max_prompt_length": 32},
        "sampling": {"max_completion_length": 10},
        "engine": {"name": "transformers"},
        "rewards": {"functions": [{"name": "toy_rewards:even_words"}]},
        "train": {
            "steps": STEPS,
            "prompts_per_step": SIZE,
            "group_size": 3,
            "token_budget": 64,
            "max_staleness": 1,
        },
        "advantage": {"dynamic_sampling": {"max_rounds": 2}},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 1e-3},
        "evaluation": {
            "data": {"source": str(heldout), "max_prompt_length": 32},
            "metric": "toy_rewards:even_words",
            "every": 3,
            "sampling": {"max_completion_length": 10, "temperature": 0.5},
        },
        "checkpoint": {"every": 1, "keep": STEPS},
    }
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(HERE / "killed_runs.py"), str(out / "config.yaml"), str(out), *KILLS],
        env=environment,
        check=True,
        timeout=580,
    )
    return out, json.loads((out / "report.json").read_text())


def consumed(run_dir: Path) -> list[list[tuple]]:
    """Per step, what was sampled for it: prompts, tokens, versions and whether it was trained on."""
    ledger = Ledger(run_dir)
    assert ledger.steps() == list(range(STEPS)) and not ledger.damaged
    records = [ledger.read(step) for step in range(STEPS)]
    return [
        [
            (g.prompt.id, kept, [(c.token_ids, c.version_spans) for c in g.completions])
            for kept, groups in ((True, record.groups), (False, record.rejected))
            for g in groups
        ]
        for record in records
        if record
    ]


def test_an_undisturbed_run_samples_one_step_ahead(runs):
    out, codes = runs
    assert codes["whole"] == [0]
    rows = read_rows(out / "whole" / "metrics.jsonl")
    assert [row["staleness/max"] for row in rows] == [0.0] + [1.0] * (STEPS - 1)
    assert sum(row["rollout/replaced"] for row in rows) > 0


@pytest.mark.parametrize("name", NAMES)
def test_it_was_killed_left_no_process_and_then_finished(runs, name):
    _out, codes = runs
    stopped = 128 + signal.SIGTERM if name.startswith("term-") else -signal.SIGKILL
    assert codes[name] == [stopped, 0]


@pytest.mark.parametrize("name", ["whole", *NAMES])
def test_every_prompt_is_consumed_once_and_in_the_order_of_the_stream(runs, name):
    out, _ = runs
    prompts = [Prompt(f"train/{i:06d}", "", (i,)) for i in range(10)]
    stream, start = PromptStream(prompts, seed=0), 0
    for step in consumed(out / name):
        expected = sorted(stream.at(n).id for n in range(start, start + len(step)))
        assert sorted(prompt_id for prompt_id, _, _ in step) == expected
        assert sum(kept for _, kept, _ in step) == SIZE
        start += len(step)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_ledger_held_is_repeated_bit_for_bit(runs, name):
    out, _ = runs
    held = HELD[name]
    assert consumed(out / name)[:held] == consumed(out / "whole")[:held]
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        whole, resumed = (
            load_file(out / which / "checkpoints" / f"step-{held:06d}" / file) for which in ("whole", name)
        )
        assert all(bool((whole[key] == resumed[key]).all()) for key in whole), file


@pytest.mark.parametrize("name", NAMES)
def test_metrics_have_neither_gaps_nor_doubles_and_no_sample_is_over_age(runs, name):
    out, _ = runs
    rows = {which: read_rows(out / which / "metrics.jsonl") for which in ("whole", name)}
    assert [row["step"] for row in rows[name]] == list(range(1, STEPS + 1))
    assert all(row["staleness/max"] <= 1 for row in rows[name])
    timing = ("time/", "sync/seconds", "tokens/per_second", "memory/")
    for whole, resumed in zip(rows["whole"][: HELD[name]], rows[name], strict=False):
        assert {k: v for k, v in whole.items() if not k.startswith(timing)} == {
            k: v for k, v in resumed.items() if not k.startswith(timing)
        }
    evaluations = [json.loads(line) for line in (out / name / "evaluation.jsonl").read_text().splitlines()]
    assert [evaluation["step"] for evaluation in evaluations] == [0, 3, 6]
