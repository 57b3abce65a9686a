"""What README.md and the contract of `rewards` show is run as it stands there."""

import re
import textwrap
from pathlib import Path

import pytest

import rewards
from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rl.types import Completion, Group, Prompt

ROOT = Path(__file__).parents[1]
CHAT = ({"role": "user", "content": "Why?"},)
TEXTS = ["x" * 199, "x" * 200]


@pytest.fixture
def grade(tmp_path, monkeypatch):
    """The scores of two completions, by a function of a module `my_rewards` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def grade_(source, name, messages, **options):
        Path("my_rewards.py").write_text(source)
        pool = RewardPool([RewardSpec(f"my_rewards:{name}", options=options)])
        completions = [Completion([1], [], [True], "stop", [], text=text) for text in TEXTS]
        try:
            (scored,) = pool.score([Group(Prompt("p", "Why?", (1,), messages, {"answer": "x"}), completions)])
        finally:
            pool.close()
        assert pool.faults.num_faulty == 0, str(pool.faults)
        return [reward.score for reward in scored.rewards]

    return grade_


@pytest.mark.parametrize("messages", [CHAT, ()], ids=["chat", "text"])
def test_the_reward_of_the_readme_tells_a_short_completion_from_a_long_one(grade, messages):
    (source,) = re.findall(
        r"```python\n(# my_rewards\.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    (name,) = re.findall(r'"my_rewards:(\w+)"', (ROOT / "README.md").read_text())
    assert grade(source, name, messages) == [1.0, 0.0]


@pytest.mark.parametrize("messages", [CHAT, ()], ids=["chat", "text"])
def test_the_reward_of_the_contract_tells_a_short_completion_from_a_long_one(grade, messages):
    text = rewards.__doc__ or ""
    source = textwrap.dedent(text[text.index("    from rewards.completion") : text.index("    rewards:\n")])
    assert grade(source, "short_and_right", messages, max_chars=199) == [1.0, 0.0]
