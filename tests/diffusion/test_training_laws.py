"""Law 1: the gradient of a step is a sum over scored tokens, however the work is cut."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rl.diffusion.elbo import pack_plan
from rl.diffusion.objectives import make_plan, normalisers, step_generator
from rl.diffusion.train import MASKS, step_examples
from tests.diffusion import training
from tests.diffusion.processes import launch
from tests.diffusion.training import make_run, step_gradient
from tests.scoring import relative_error


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Prompts of 1 to 6 words and answers of 1 to 25."""
    draw = random.Random(0)
    text = lambda most: " ".join(f"w{draw.randrange(80)}" for _ in range(draw.randint(1, most)))  # noqa: E731
    rows = [{"prompt": text(6), "completion": text(25)} for _ in range(20)]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("scheme", ["coupled", "count", "bernoulli"])
@pytest.mark.parametrize("policy", ["batch_max", "single"])
def test_gradient_does_not_depend_on_the_token_budget(tiny_model_dir, data, tmp_path, scheme, policy):
    settings = [f"objective.scheme={scheme}", f"eos.policy={policy}"]
    one = make_run(str(tiny_model_dir), str(data), str(tmp_path / "one"), *settings)
    many = make_run(
        str(tiny_model_dir), str(data), str(tmp_path / "many"), *settings, "train.token_budget=50"
    )
    (a, numbers), (b, others) = step_gradient(one), step_gradient(many)
    assert relative_error(a, b) <= 1e-5
    of_process = {"time/pack", "time/train", "memory/peak"}
    for name in numbers.keys() - of_process:
        assert others[name] == pytest.approx(numbers[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_gradient_equals_the_plain_formula_on_padded_rows(tiny_model_dir, data, tmp_path, per):
    """The loss of the paper written out with transformers' own logits, an explicit mask and right padding:
    each example on its own, all summed.
    """
    run = make_run(str(tiny_model_dir), str(data), str(tmp_path / "run"), f"objective.normaliser={per}")
    ours, numbers = step_gradient(run)
    examples = step_examples(run, 0)
    plan = make_plan(examples, step_generator(0, MASKS, 0), mask_token_id=run.policy.mask_token_id)
    model = run.policy.model
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    width = max(len(copy.token_ids_T) for copy in plan)
    ids = torch.zeros(len(plan), width, dtype=torch.long)
    mask = torch.zeros(len(plan), 1, width, width, dtype=torch.bool)
    for i, copy in enumerate(plan):
        ids[i, : len(copy.token_ids_T)] = copy.token_ids_T
        mask[i, :, :, : len(copy.token_ids_T)] = True
    logprobs = torch.log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, -1)
    loss, weights = torch.zeros(()), normalisers(examples, per)
    for i, copy in enumerate(plan):
        found = logprobs[i, copy.columns_K].gather(-1, copy.targets_K[:, None]).squeeze(-1)
        loss = loss - weights[copy.example] * (copy.weights_K * found).sum()
    loss.backward()
    padded = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert relative_error(ours, padded) <= 1e-5
    assert numbers["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(pack_plan(plan, 50)) > 5


@pytest.mark.parametrize(("shard", "words"), [("false", []), ("true", []), ("true", ["model.lora={r: 4}"])])
def test_gradient_does_not_depend_on_the_number_of_processes(tiny_model_dir, data, tmp_path, shard, words):
    """Seven examples over two ranks, copies of the weights or halves of them: one rank has four examples,
    the other three, and other numbers of rows.
    """
    arguments = [str(tiny_model_dir), str(data), str(tmp_path / "out"), "train.token_budget=60", *words]
    launch(Path(training.__file__), arguments, 1)
    launch(Path(training.__file__), [*arguments, f"train.shard={shard}"], 2)
    one = load_file(tmp_path / "out-0of1.safetensors")
    names = ["out-0of1.json", "out-0of2.json", "out-1of2.json"]
    numbers = [json.loads((tmp_path / name).read_text()) for name in names]
    for rank in (0, 1):
        assert relative_error(one, load_file(tmp_path / f"out-{rank}of2.safetensors")) <= 1e-5
        idle = {"diffusion/packed_tokens", "diffusion/scored_share", "tokens/trained"}  # idle rows count
        for name in numbers[0].keys() - {"memory/peak"} - (idle if shard == "true" else set()):
            value = numbers[0][name]
            assert numbers[1 + rank][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("option", ["model.gradient_checkpointing=true", "model.compile=true"])
def test_memory_and_speed_options_do_not_change_the_gradient(tiny_model_dir, data, tmp_path, option):
    plain = make_run(str(tiny_model_dir), str(data), str(tmp_path / "plain"))
    other = make_run(str(tiny_model_dir), str(data), str(tmp_path / "other"), option)
    assert relative_error(step_gradient(plain)[0], step_gradient(other)[0]) <= 1e-5


def test_lora_trains_adapters_only(tiny_model_dir, data, tmp_path):
    run = make_run(str(tiny_model_dir), str(data), str(tmp_path / "lora"), "model.lora={r: 4, alpha: 8}")
    found, _ = step_gradient(run)
    assert found and all("lora_" in name for name in found)
    assert any(g.abs().max() > 0 for g in found.values())


def test_steps_visit_every_example_once_an_epoch(tiny_model_dir, data, tmp_path):
    settings = ["train.examples_per_step=5", "eos.policy=single"]
    run = make_run(str(tiny_model_dir), str(data), str(tmp_path / "run"), *settings)
    steps = [[tuple(e.token_ids_T.tolist()) for e in step_examples(run, step)] for step in range(8)]
    first, second = ([e for step in steps[a : a + 4] for e in step] for a in (0, 4))
    assert len(set(first)) == 20
    assert sorted(first) == sorted(second) and first != second
