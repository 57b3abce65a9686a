"""One GRPO step of ours and of TRL's GRPOTrainer on the same model, prompts and completion lengths, in one
run.

    python -m tests.bench.step [--model FOLDER] [--steps 3] [--threads 2]

Sampling: both draw the same number of completions of the same fixed length. Training: both get the same
ragged completions and rewards, so that tokens are equal; TRL in its best settings (no gradient
checkpointing, micro-batch 16) and in its default (checkpointing on). Both compute in fp32. Prints seconds
per step by phase and the ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.engines import make_engine
from rl.advantages import compute_advantages
from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config import EngineConfig
from rl.config.read import load_config
from rl.optimizer import make_optimizer
from rl.types import Completion, Group, Prompt, Reward, SamplingParams, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rl.world import World
from tests.calling import call
from tests.conftest import make_tiny_tokenizer

NUM_PROMPTS, GROUP_SIZE, PROMPT_LENGTH, MAX_LENGTH = 8, 8, 60, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: a random Llama of 8 layers, hidden 256")
    parser.add_argument("--steps", type=int, default=3, help="measured steps after one warm-up")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or small_model(Path(scratch) / "model")
        groups = draw_groups(AutoTokenizer.from_pretrained(folder))
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        longest = max(len(c.token_ids) for g in groups for c in g.completions)
        print(
            f"{NUM_PROMPTS} prompts of {PROMPT_LENGTH} tokens x {GROUP_SIZE} completions: {tokens} tokens, "
            f"mean {tokens / NUM_PROMPTS / GROUP_SIZE:.0f}, longest {longest}"
        )
        rows = {
            "cohort": our_training(folder, groups, arguments.steps),
            "trl, best": trl_training(folder, groups, arguments.steps, checkpointing=False),
            "trl, default": trl_training(folder, groups, arguments.steps, checkpointing=True),
        }
        rows["cohort"]["sample"] = our_sampling(folder, groups)
        rows["trl, best"]["sample"] = rows["trl, default"]["sample"] = trl_sampling(folder, groups)
    show(rows)


def small_model(folder: Path) -> Path:
    tokenizer = make_tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def draw_groups(tokenizer) -> list[ScoredGroup]:
    """Lengths are geometric with mean about 40, cut at 128; one reward in three is 1."""
    draw = random.Random(0)
    size = len(tokenizer)
    groups = []
    for p in range(NUM_PROMPTS):
        prompt = Prompt(f"p{p}", str(p), tuple(draw.randrange(10, size) for _ in range(PROMPT_LENGTH)))
        completions, rewards = [], []
        for _ in range(GROUP_SIZE):
            n = min(MAX_LENGTH, 1 + int(draw.expovariate(1 / 40)))
            ids = [draw.randrange(10, size) for _ in range(n)]
            completions.append(Completion(ids, [-5.0] * n, [True] * n, "stop", [VersionSpan(0, n)]))
            rewards.append(Reward(float(draw.random() < 1 / 3)))
        groups.append(ScoredGroup(Group(prompt, completions), rewards))
    return groups


def our_training(folder: Path, groups: list[ScoredGroup], steps: int) -> dict[str, float]:
    config = load_config(
        None,
        [
            f"model.name={folder}",
            "model.dtype=fp32",
            "loss.kl_coef=0",
            "loss.name=dapo",
            "loss.sampler_correction=null",
            "train.token_budget=4096",
        ],
    )
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
    assert policy.settle_attention() is None
    optimizer = make_optimizer(policy.trainable(), config.optimizer)
    seconds: list[float] = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        advantages = compute_advantages(groups, config=config.advantage, weights={})
        batches = pack(groups, advantages, pack_rules(config))
        update_policy(policy, optimizer, batches, config.loss, world=World(policy.accelerator))
        seconds.append(time.perf_counter() - began)
    return {"train": statistics.median(seconds[1:])}


def trl_training(
    folder: Path, groups: list[ScoredGroup], steps: int, *, checkpointing: bool
) -> dict[str, float]:
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    by_name = {g.prompt.text: g for g in groups}

    def rollout(prompts, trainer):
        seen: dict[str, int] = {}
        answers = []
        for name in prompts:
            seen[name] = seen.get(name, -1) + 1
            answers.append((by_name[name], seen[name] % GROUP_SIZE))
        return {
            "prompt_ids": [list(g.prompt.token_ids) for g, _ in answers],
            "completion_ids": [list(g.completions[i].token_ids) for g, i in answers],
            "logprobs": None,
            "score": [g.rewards[i].score for g, i in answers],
        }

    def reward(completions, score, **_):
        return score

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            rollout_func=rollout,
            callbacks=[Clock()],
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list([{"prompt": g.prompt.text} for g in groups]),
            args=GRPOConfig(
                output_dir=out,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=NUM_PROMPTS * GROUP_SIZE // 16,
                num_generations=GROUP_SIZE,
                max_completion_length=MAX_LENGTH,
                max_steps=steps + 1,
                num_train_epochs=steps + 1,
                gradient_checkpointing=checkpointing,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=100,
            ),
        )
        trainer.train()
    return {"train": statistics.median(seconds[1:])}


def our_sampling(folder: Path, groups: list[ScoredGroup], length: int = 32) -> float:
    engine = make_engine(
        EngineConfig(),
        str(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_length=PROMPT_LENGTH + length,
        max_num_seqs=256,
        revision=None,
        note=print,
    )
    seconds = []
    for seed in range(3):
        began = time.perf_counter()
        sampled = engine.generate(
            call(
                [g.prompt for g in groups],
                num_completions=GROUP_SIZE,
                sampling=SamplingParams(max_completion_length=length),
                seeds=list(range(seed, seed + len(groups))),
            )
        )
        seconds.append(time.perf_counter() - began)
        assert all(len(c.token_ids) == length for g in sampled for c in g.completions)
    engine.close()
    return statistics.median(seconds[1:])


def trl_sampling(folder: Path, groups: list[ScoredGroup], length: int = 32) -> float:
    """TRL without vLLM calls `generate` on the left-padded batch with these settings (grpo_trainer.py)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([g.prompt.token_ids for g in groups for _ in range(GROUP_SIZE)])
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                min_new_tokens=length,
                max_new_tokens=length,
                top_k=0,
                disable_compile=True,
            )
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def show(rows: dict[str, dict[str, float]]) -> None:
    phases = ("sample", "train")
    print(f"{'seconds per step':18s}" + "".join(f"{phase:>10s}" for phase in (*phases, "both")))
    for name, times in rows.items():
        cells = [*(times[phase] for phase in phases), sum(times.values())]
        print(f"{name:18s}" + "".join(f"{cell:10.2f}" for cell in cells))
    ours = rows["cohort"]
    for name in ("trl, best", "trl, default"):
        ratios = [*(rows[name][phase] / ours[phase] for phase in phases)]
        ratios.append(sum(rows[name].values()) / sum(ours.values()))
        print(f"{name + ' / cohort':24s}" + "".join(f"{ratio:9.2f}x" for ratio in ratios))
    print(json.dumps({name: {k: round(v, 3) for k, v in times.items()} for name, times in rows.items()}))


if __name__ == "__main__":
    main()
