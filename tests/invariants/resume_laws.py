"""Law 6: killed anywhere and started again, a run ends with the weights, logs and prompts of an undisturbed
one. Test files import these tests, and have the fixture `runs`: a folder, and exit codes by name of a run.
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
from tests.conftest import selected

HERE = Path(__file__).parent
STEPS = 6
KILLS = ("sample:4", "score:4", "train:4", "save:2", "sync:5", "eval:2", "term-train:2")
LATER = pytest.mark.rotation("rarer kills")
NAMES = [
    pytest.param(name, marks=[] if name == "train" else [LATER])
    for name in (kill.partition(":")[0] for kill in KILLS)
]


def write_config(model_dir: Path, out: Path, **train: str) -> None:
    data = out / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is w{i} + w{i + 1} ?"}) + "\n" for i in range(10)))
    heldout = out / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"prompt": f"What is w{i} ?"}) + "\n" for i in range(40, 46)))
    config = {
        "model": {
            "name": str(model_dir),
            "dtype": "fp32",
            "reference": {"update_every": 2, "mixup": 0.5},
        },
        "data": {"source": str(data), "max_prompt_length": 32},
        "sampling": {"max_completion_length": 10},
        "engine": {"name": "transformers"},
        "rewards": {
            "functions": [
                {"name": "toy_rewards:low_words", "weight": 1.0},
                {"name": "toy_rewards:even_words", "weight": 0.5},
            ]
        },
        "train": {
            "steps": STEPS,
            "prompts_per_step": 4,
            "group_size": 3,
            "token_budget": 64,
            "num_epochs": 2,
            **train,
        },
        "advantage": {"dynamic_sampling": {"max_rounds": 2}},
        "loss": {"kl_coef": 0.05},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
        "evaluation": {
            "data": {"source": str(heldout), "max_prompt_length": 32},
            "metric": "toy_rewards:low_words",
            "every": 3,
            "sampling": {"max_completion_length": 10, "temperature": 0.5},
        },
        "checkpoint": {"every": 2},
    }
    (out / "config.yaml").write_text(yaml.safe_dump(config))


def kill_and_resume(
    request: pytest.FixtureRequest, model_dir: Path, out: Path, *words: str, **train: str
) -> tuple[Path, dict[str, list[int]]]:
    """The runs that the selected tests ask for, and an undisturbed one."""
    write_config(model_dir, out, **train)
    names = selected(request, "name")
    start("killed_runs.py", out, *words, *(kill for kill in KILLS if kill.partition(":")[0] in names))
    return out, json.loads((out / "report.json").read_text())


def start(script: str, out: Path, *words: str) -> None:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(HERE / script), str(out / "config.yaml"), str(out), *words],
        env=environment,
        check=True,
        timeout=580,
    )


def tensors(run: Path, step: int, part: str) -> dict:
    """What the files of all processes hold of a part of a checkpoint, by file and name."""
    files = (run / "checkpoints" / f"step-{step:06d}" / part).glob("*.safetensors")
    return {f"{f.name} {name}": x for f in files for name, x in load_file(f).items() if f.stem != "rng"}


@pytest.mark.parametrize("name", NAMES)
def test_it_was_killed_left_no_process_and_then_finished(runs, name):
    _out, codes = runs
    assert codes["whole"] == [0]
    stopped = 128 + signal.SIGTERM if name.startswith("term-") else -signal.SIGKILL
    assert codes[name] == [stopped, 0]


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_optimizer_are_bitwise_those_of_an_undisturbed_run(runs, name):
    out, _ = runs
    for part in (".", "trainer"):
        whole, resumed = (tensors(out / which, STEPS, part) for which in ("whole", name))
        assert whole.keys() == resumed.keys() and whole
        assert all(bool((whole[key] == resumed[key]).all()) for key in whole), part
    last, earlier = (tensors(out / "whole", step, ".") for step in (6, 4))
    assert any(bool((last[key] != earlier[key]).any()) for key in last)


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_is_consumed_once_and_in_the_same_order(runs, name):
    out, _ = runs
    consumed = {}
    for which in ("whole", name):
        ledger = Ledger(out / which)
        steps = [share for step in range(STEPS) for share in ledger.read_all(step) or ()]
        assert sorted({share.step for share in steps}) == ledger.steps() == list(range(STEPS))
        consumed[which] = [
            (g.prompt.id, [c.token_ids for c in g.completions])
            for s in steps
            for g in (*s.groups, *s.rejected)
        ]
    assert consumed["whole"] == consumed[name]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_have_neither_gaps_nor_doubles(runs, name):
    out, _ = runs
    rows = {}
    for which in ("whole", name):
        lines = [json.loads(line) for line in (out / which / "metrics.jsonl").read_text().splitlines()]
        timing = ("time/", "sync/seconds", "tokens/per_second", "memory/")
        rows[which] = [{k: v for k, v in row.items() if not k.startswith(timing)} for row in lines]
    assert [row["step"] for row in rows["whole"]] == list(range(1, STEPS + 1))
    assert rows["whole"] == rows[name]
    evaluations = [(out / which / "evaluation.jsonl").read_text() for which in ("whole", name)]
    assert evaluations[0] == evaluations[1]


def test_two_checkpoints_are_kept_and_load_as_plain_models(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = runs
    folders = sorted(p.name for p in (out / "whole" / "checkpoints").iterdir() if p.is_dir())
    assert folders == ["step-000004", "step-000006"]
    newest = out / "whole" / "checkpoints" / "step-000006"
    model = AutoModelForCausalLM.from_pretrained(newest)
    assert AutoTokenizer.from_pretrained(newest).eos_token == "<eos>"
    saved = {name.partition(" ")[2]: x for name, x in tensors(out / "whole", STEPS, ".").items()}
    assert saved.keys() == dict(model.named_parameters()).keys()
    assert all(bool((saved[name] == p).all()) for name, p in model.named_parameters())
