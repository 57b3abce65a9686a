"""Law 6 for episodes: killed between turns and started again, a run ends bitwise like an undisturbed one, and
no tool is asked again for an answer that is on disk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rl.store.ledger import Ledger
from rl.types import Group

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(600)
STEPS = 3
KILLS = {"asked": 1, "answered": 3, "later": 9}
"""The journal's append after which a run is killed: with calls under way, and in the middle of answers."""


@pytest.fixture(scope="module")
def out(tiny_model_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("episodes")
    (out / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is w{i} ?"}) + "\n" for i in range(10))
    )
    config = {
        "model": {"name": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"source": str(out / "data.jsonl"), "max_prompt_length": 32},
        # Half of the words end a turn, so that turns end: the model is untrained.
        "sampling": {"max_completion_length": 60, "stop_token_ids": list(range(5, 60))},
        "engine": {"name": "transformers"},
        "environment": {
            "name": "played_environments:Logged",
            "options": {"file": "?"},
            "max_turns": 4,
            "max_turn_length": 12,
        },
        "rewards": {"functions": [{"name": "environment"}], "max_fault_share": 1.0},
        "train": {"steps": STEPS, "prompts_per_step": 2, "group_size": 3, "token_budget": 256},
        "advantage": {"name": "rloo", "credit": "turns"},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 2},
    }
    (out / "plain.yaml").write_text(yaml.safe_dump(config))
    config["environment"]["options"]["repeatable"] = False
    (out / "once.yaml").write_text(yaml.safe_dump(config))
    config["train"] |= {"steps": 1, "prompts_per_step": 10, "group_size": 20}
    (out / "many.yaml").write_text(yaml.safe_dump(config))
    runs = [f"{name}={out}/plain.yaml:SIGKILL:{nth}" for name, nth in {"whole": 0, **KILLS}.items()]
    runs += [f"once={out}/once.yaml:SIGKILL:1", f"many={out}/many.yaml:SIGTERM:1"]
    path = f"{HERE.parents[1]}:{HERE}:{HERE.parent / 'recipes'}"
    subprocess.run(
        [sys.executable, str(HERE / "killed_episodes.py"), str(out), *runs],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=580,
    )
    return out


def calls(path: Path) -> list[str]:
    return path.read_text().splitlines()


def timeless(group: Group) -> Group:
    """A group without the seconds that its environment took, which are measured anew after a kill."""
    completions = []
    for c in group.completions:
        counts = {n: v for n, v in c.facts.get("counts", {}).items() if not n.startswith("seconds/")}
        completions.append(replace(c, facts={**c.facts, "counts": counts, "seconds": None}))
    return Group(group.prompt, completions)


@pytest.mark.parametrize("name", KILLS)
def test_a_run_that_was_killed_between_turns_is_bitwise_the_undisturbed_one(out, name):
    assert json.loads((out / "whole.json").read_text()) == [0]
    assert json.loads((out / f"{name}.json").read_text()) == [-signal.SIGKILL, 0]
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        whole, resumed = (
            load_file(out / which / "checkpoints" / f"step-{STEPS:06d}" / file) for which in ("whole", name)
        )
        assert whole.keys() == resumed.keys()
        assert all(bool((whole[key] == resumed[key]).all()) for key in whole), file
    ledgers = [Ledger(out / which) for which in ("whole", name)]
    for step in range(STEPS):
        one, other = (ledger.read(step) for ledger in ledgers)
        assert one is not None and other is not None
        assert [timeless(g.group) for g in one.groups] == [timeless(g.group) for g in other.groups]
        assert one.advantages == other.advantages


@pytest.mark.parametrize("name", KILLS)
def test_no_answer_that_is_on_disk_is_asked_for_again(out, name):
    """After the kill exactly the calls without an answer are made: under way, or not made yet."""
    whole, every = calls(out / "whole.calls"), calls(out / f"{name}.calls")
    answered = int((out / f"{name}.answered").read_text())
    num_before = len(calls(out / f"{name}.before"))
    assert len(every) - num_before + answered >= len(whole) > 20
    assert not Counter(whole) - Counter(every)
    num_again = len(every) - len(whole)
    assert num_again <= 6  # at most those that were under way, of six episodes
    in_flight_or_more = Counter(every) - Counter(whole)
    assert sum(in_flight_or_more.values()) == num_again


def test_a_call_under_way_that_may_not_be_made_again_lets_its_episode_abstain(out):
    assert json.loads((out / "once.json").read_text()) == [-signal.SIGKILL, 0]
    record = Ledger(out / "once").read(0)
    assert record is not None
    completions = [c for g in record.groups for c in g.completions]
    failed = [c for c in completions if c.finish_reason == "abort"]
    assert failed and all("under way when the run was killed" in c.facts["interrupted"] for c in failed)
    assert all(
        r.score is None
        for g in record.groups
        for r, c in zip(g.rewards, g.completions, strict=True)
        if c in failed
    )
    assert max(Counter(calls(out / "once.calls")).values()) <= max(
        Counter(calls(out / "whole.calls")).values()
    )


def test_episodes_are_trained_with_their_turns(out):
    record = Ledger(out / "whole").read(0)
    assert record is not None and record.advantages is not None
    completions = [c for g in record.groups for c in g.completions]
    assert max(len(c.facts["rewards"]) for c in completions) >= 3
    for group, advantages in zip(record.groups, record.advantages, strict=True):
        for completion, per_token in zip(group.completions, advantages, strict=True):
            assert len(per_token) == len(completion.token_ids)
    # A journal holds what the newest weights may still ask for, and nothing older.
    assert [path.name for path in (out / "whole" / "journal").iterdir()] == [f"v{STEPS:06d}-rank0.jsonl"]


def test_sigterm_with_two_hundred_episodes_open_leaves_no_process(out):
    """`in_forks` raises where a process outlives its run."""
    assert json.loads((out / "many.json").read_text())[0] in (0, 128 + signal.SIGTERM)
    record = Ledger(out / "many").read(0)
    assert record is not None and sum(len(g.completions) for g in record.groups) == 200
