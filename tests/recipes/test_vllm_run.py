"""A whole run sampled by real vLLM, and its checkpoint read by vLLM as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.grpo import main
from rl.store.ledger import Ledger
from rl.store.rows import read_rows
from rl.types import Prompt, SamplingParams
from tests.calling import call
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = [
    pytest.mark.slow,
    needs_vllm,
]


@pytest.fixture
def wide_model_dir(tiny_model_dir, tmp_path):
    """The tiny model with heads of 32, for which vLLM's CPU attention has a kernel."""
    folder = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(tiny_model_dir, hidden_size=64, num_attention_heads=2)
    config.num_key_value_heads, config.head_dim = 1, 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


SCRIPT = """
import sys
from recipes.grpo import run

open("began.txt", "a").write("x")

def length(completions, **columns):
    print("graded")
    return [float(len(str(c))) for c in completions]

engine = {"name": "vllm", "process": "own", "kv_cache_gib": 0.1}
model = {"name": sys.argv[2], "lora": {"r": 2}}
names = {"rewards.functions": [{"name": "length"}]}
run(sys.argv[1], {"length": length}, model=model, engine=engine, **names)
"""


def test_a_script_without_a_guard_and_vllm_in_its_own_process(config_file, wide_model_dir, tmp_path):
    """A spawned core imports no script again; the second run goes on with the adapter of the first one."""
    (tmp_path / "train.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{os.environ['PYTHONPATH']}"}
    for source in (wide_model_dir, tmp_path / "first" / "checkpoints" / "step-000002"):
        words = [sys.executable, "train.py", str(config_file), str(source)]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = read_rows(tmp_path / "run" / "metrics.jsonl")
        assert len(rows) == 2 and max(row["sampler/logprob_gap_max"] for row in rows) < 1e-3
        assert "graded" in (tmp_path / "run" / "graders.log").read_text()
        (tmp_path / "run").rename(tmp_path / ("second" if "is trained further" in done.stdout else "first"))
    assert (tmp_path / "second").is_dir()
    assert (tmp_path / "began.txt").read_text() == "xxxx"  # twice the script and its grader


def test_a_run_on_vllm_learns_from_its_own_logprobs_and_vllm_reads_the_checkpoint(
    config_file, heldout, wide_model_dir
):
    overrides = [f"model.name={wide_model_dir}", "engine.name=vllm", "engine.kv_cache_gib=0.1"]
    assert main([str(config_file), *heldout, *overrides]) == 0
    run = config_file.parent / "run"
    for row in read_rows(run / "metrics.jsonl"):
        assert row["sampler/logprob_gap_max"] < 1e-3 and row["sync/canary_gap_max"] < 1e-3
        assert row["policy/grad_norm"] > 0
    newest = run / "checkpoints" / "step-000002"
    trained = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(wide_model_dir, dtype=torch.float32)
    assert any((a != b).any() for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(newest)
    engine = start_vllm(newest, tokenizer, dtype=torch.float32, max_model_len=64, kv_cache_gib=0.1)
    try:
        ids = list(range(5, 25))
        logits = trained(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        assert engine.prompt_logprobs(ids) == pytest.approx(expected, abs=1e-3)
        prompt = Prompt("p", "", tuple(ids))
        sampling = SamplingParams(max_completion_length=4)
        (group,) = engine.generate(call([prompt], num_completions=2, sampling=sampling, seeds=[1]))
        assert all(len(c.token_ids) == 4 for c in group.completions)
    finally:
        engine.close()
    record = Ledger(run).read(0)
    assert record is not None and {c.policy_version for g in record.groups for c in g.completions} == {0}
