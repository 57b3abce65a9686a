"""Reward functions cross over unchanged: TRL's run in our pool, ours run in TRL's trainer."""

from __future__ import annotations

import pytest
import torch

from rewards.adapters import as_trl
from rewards.pool.pool import RewardPool
from rl.types import Completion, Group, Prompt, VersionSpan


def group(*texts: str, **columns) -> Group:
    messages = ({"role": "user", "content": "What is 1 + 1 ?"},)
    prompt = Prompt("p", "What is 1 + 1 ?", (5, 6), messages, columns)
    completions = [
        Completion([7] * n, [0.0] * n, [True] * n, "stop", [VersionSpan(0, n)], text)
        for text in texts
        for n in [len(text.split())]
    ]
    return Group(prompt, completions)


def test_trl_rewards_score_here_what_they_score_there():
    from trl.rewards import accuracy_reward, think_format_reward

    texts = ["<think>\nsum\n</think>\n\\boxed{2}", "\\boxed{3}", "I do not know"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    expected = list(
        zip(
            think_format_reward(completions=chats),
            accuracy_reward(completions=chats, solution=["$2$"] * 3),
            strict=True,
        )
    )
    pool = RewardPool(["trl.rewards:think_format_reward", "trl.rewards:accuracy_reward"], deadline_s=60)
    try:
        (scored,) = pool.score([group(*texts, solution="$2$")])
    finally:
        pool.close()
    names = ["trl.rewards:think_format_reward", "trl.rewards:accuracy_reward"]
    assert [tuple(r.parts[n] for n in names) for r in scored.rewards] == expected
    assert len(set(expected)) == 2


@pytest.mark.slow
def test_our_rewards_run_in_trls_grpo_trainer(tiny_model_dir, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    seen: list[list[float | None]] = []
    ours = as_trl("soft_overlong", max_length=8, buffer=6)

    def recorded(**arguments):
        scores = ours(**arguments)
        seen.append(scores)
        return scores

    recorded.__name__ = ours.__name__
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        reward_funcs=[recorded, as_trl("boxed_format")],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "What is w1 ?"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    with torch.random.fork_rng():
        trainer.train()
    assert trainer.state.global_step == 2
    assert len(seen) == 2 and all(len(scores) == 4 for scores in seen)
    assert all(isinstance(score, float) and -1 <= score <= 0 for scores in seen for score in scores)
