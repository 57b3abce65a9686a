"""A teacher that reads a demonstration in front of the prompt, which may be the policy itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.grpo import main
from recipes.models import teacher_model
from recipes.tasks.many import train_prompts
from rl.batch import pack
from rl.config.read import load_config
from rl.config.teacher import DEMONSTRATED
from rl.store.ledger_lines import decode_group, encode_group
from rl.teacher import DIVERGENCES, Teacher
from rl.update import pack_rules, update_policy
from tests.conftest import make_tiny_tokenizer
from tests.rl.taught import ALONE, shown
from tests.scoring import alone, prepared, relative_error

KINDS = ["sampled", *DIVERGENCES]
SAID = {"template_file": None, "note": print}


@pytest.fixture
def make(tiny_model_dir):
    from accelerate import Accelerator

    from rl.causal import CausalPolicy

    def make(kind="sampled", *overrides, name=None):
        section = {"demonstration": "solution", "divergence": kind, "top_k": 5}
        section |= {"name": str(name), "dtype": "fp32"} if name else {}
        settings = [f"model.name={tiny_model_dir}", "model.dtype=fp32", *ALONE]
        config = load_config(None, [*settings, f"teacher={json.dumps(section)}", *overrides])
        policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=config.sampling.temperature)
        assert policy.settle_attention() is None
        teacher = Teacher(config.teacher, teacher_model(config.teacher), policy, longest=64, note=print)
        return policy, teacher, config

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_without_anything_to_read_loss_and_gradient_are_zero(make, ragged_groups, gradients, kind):
    """Bitwise for the sampled log-ratio; a divergence's gradient is a sum of terms that cancel: < 1e-7."""
    groups, advantages = ragged_groups()
    zeros = [[0.0] * len(row) for row in advantages]
    policy, teacher, config = make(kind)
    for length, is_zero in ((lambda number: 0, True), (lambda number: 2, False)):
        given = shown(groups, length)
        found = gradients(policy, config, given, zeros, teacher=teacher)
        largest = max(g.abs().max().item() for g in found.values())
        (batch,) = pack(given, zeros, pack_rules(config))
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
        metrics = update_policy(
            policy, optimizer, [batch], config.loss, world=alone(), teacher=teacher
        ).metrics
        if is_zero:
            assert largest == 0.0 if kind == "sampled" else largest < 1e-7
            assert abs(metrics["policy/loss"]) < 1e-7 and metrics["teacher/kl"] == 0.0
        else:
            assert largest > 1e-4 and metrics["teacher/kl"] != 0.0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("of", ["policy", "frozen"])
def test_log_probs_are_those_behind_the_other_prompt(make, other_model_dir, ragged_groups, of, packed):
    """Against the logits of transformers, row by row, at a temperature of 0.8, in ragged micro-batches."""
    groups, advantages = ragged_groups()
    groups = shown(groups)
    policy, teacher, config = make(
        "forward",
        "sampling.temperature=0.8",
        "train.token_budget=60",
        name=other_model_dir if of == "frozen" else None,
    )
    policy.set_packed(packed)
    teacher.scorer.set_packed(packed)
    model = AutoModelForCausalLM.from_pretrained(other_model_dir if of == "frozen" else config.model.name)
    (batch,) = pack(groups, advantages, pack_rules(config, share_prompts=packed))
    assert len(batch.micro_batches) > 3
    for micro in batch.micro_batches:
        taught = teacher.score(prepared(policy, micro))
        whole = []
        for row in micro.rows:
            ids = torch.tensor([[*row.prompt.teacher_token_ids, *row.completion.token_ids]])
            assert ids.shape[1] > len(row.prompt.token_ids) + len(row.completion.token_ids)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(row.prompt.teacher_token_ids) - 1 : -1]
            whole.append((logits / 0.8).log_softmax(-1))
        expected, targets = torch.cat(whole), micro.targets_L[:, None]
        torch.testing.assert_close(taught.logprobs_L, expected.gather(1, targets)[:, 0], rtol=1e-4, atol=1e-4)
        assert (taught.ids_LK == expected.topk(5).indices).float().mean() > 0.99
        asked = expected.gather(1, taught.ids_LK)
        torch.testing.assert_close(taught.logprobs_LK, asked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sampled", "reverse"])
def test_the_gradient_does_not_depend_on_how_work_is_cut(make, ragged_groups, gradients, kind):
    groups, advantages = ragged_groups()
    groups = shown(groups)
    policy, teacher, config = make(kind, "loss.clip_high=4.0")
    cut = config.model_copy(update={"train": config.train.model_copy(update={"token_budget": 40})})
    whole = gradients(policy, config, groups, advantages, teacher=teacher)
    found = {
        "budget": gradients(policy, cut, groups, advantages, teacher=teacher),
        "order": gradients(policy, config, groups[::-1], advantages[::-1], teacher=teacher),
    }
    policy.set_packed(False)
    found["rows"] = gradients(policy, config, groups, advantages, teacher=teacher)
    for name, other in found.items():
        assert relative_error(whole, other) <= 1e-5, name


def test_the_policy_teaches_with_its_weights_of_now_and_a_copy_with_those_of_the_start(
    make, tiny_model_dir, ragged_groups
):
    groups, advantages = ragged_groups()
    moved = {}
    for name in (None, tiny_model_dir):
        policy, teacher, config = make(name=name)
        (batch,) = pack(shown(groups), advantages, pack_rules(config))
        (drawn,) = policy.prepare(batch, draw=0)
        before = teacher.score(drawn).logprobs_L
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.5)
        update_policy(policy, optimizer, [batch], config.loss, world=alone(), teacher=teacher)
        moved[name] = (teacher.score(drawn).logprobs_L - before).abs().max().item()
        assert all(p.requires_grad for _, p in policy.trainable()) and policy.scorer.training
    assert moved[None] > 1e-3 and moved[tiny_model_dir] == 0.0


def test_the_ledger_replays_what_the_teacher_read(ragged_groups):
    groups, advantages = ragged_groups()
    for plain, group in zip(groups, shown(groups), strict=True):
        line = encode_group(group, 0, {"advantages": advantages[0]})
        assert decode_group(json.loads(line)).prompt == group.prompt
        old = json.loads(encode_group(plain, 0, {"advantages": advantages[0]}))
        assert "teacher_token_ids" not in old["prompt"]
        assert decode_group(old).prompt.teacher_token_ids == ()


ROWS = [
    {"prompt": "What is w1 ?", "solution": "w2 + {prompt} w3 = w4", "answer": "w4"},
    {"prompt": [{"role": "user", "content": "w5"}, {"role": "user", "content": "w6 ?"}], "solution": "w7"},
]


def rendered(tmp_path, rows, *overrides):
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    config = load_config(None, ["data.source=x.jsonl", *overrides])
    return train_prompts(config, rows, [], tokenizer, **SAID), tokenizer


def test_the_policy_never_reads_the_demonstration_and_the_teacher_does(tmp_path):
    template = "teacher.template=w20 {demonstration} w21 {prompt} w22"
    for rows, more in (
        (ROWS, []),
        (ROWS[:1], ["data.chat=false"]),
        (ROWS[:1], ["data.template=w30 {prompt} w31"]),
    ):
        plain, _ = rendered(tmp_path, rows, *more)
        taught, tokenizer = rendered(tmp_path, rows, *more, "teacher.demonstration=solution", template)
        assert [replace(p, teacher_token_ids=()) for p in taught] == list(plain)
        assert not {"w2", "w3", "w7"} & set(" ".join(tokenizer.decode(p.token_ids) for p in taught).split())
        read = [tokenizer.convert_ids_to_tokens(p.teacher_token_ids) for p in taught]
        first = "w20 w2 + {prompt} w3 = w4 w21 What is w1 ? w22".replace("{prompt}", "<unk>")
        expected = {
            "": [
                f"<user> {first} <eos> <assistant>",
                "<user> w5 <eos> <user> w20 w7 w21 w6 ? w22 <eos> <assistant>",
            ],
            "data.chat=false": [first],
            "data.template=w30 {prompt} w31": [f"<user> w30 {first} w31 <eos> <assistant>"],
        }
        assert [" ".join(ids) for ids in read] == expected["".join(more)]


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (
            ROWS,
            ["teacher.demonstration=solutions"],
            r"train row 0: the dataset has no column 'solutions'; .* did you mean 'solution'\?",
        ),
        ([*ROWS, {"prompt": "w1", "solution": " "}], [], "train row 2: column 'solution' holds ' '"),
        ([{"prompt": "w1", "solution": 5}], [], "train row 0: column 'solution' holds 5"),
        (
            [{"prompt": [{"role": "system", "content": "w1"}], "solution": "w2"}],
            [],
            "has no message of a user",
        ),
    ],
)
def test_a_row_without_a_demonstration_is_refused(tmp_path, rows, overrides, message):
    with pytest.raises(ValueError, match=message):
        rendered(tmp_path, rows, "teacher.demonstration=solution", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher={coef: 0.5}"], "teacher needs one of .* or teacher.demonstration=COLUMN"),
        (["teacher={demonstration: a, dtype: fp32}"], "teacher.dtype does nothing without teacher.name"),
        (["teacher={name: x, template: '{prompt}'}"], "template does nothing without teacher.demonstration"),
        (["teacher={demonstration: a, template: 'x {prompt}'}"], r"has no \{demonstration\}"),
        (["teacher={demonstration: a}", "environment={name: gym}"], "needs completions of one turn"),
    ],
)
def test_settings_that_do_nothing_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
    assert "{demonstration}" in DEMONSTRATED


def test_a_demonstration_that_is_too_long_for_the_model_ends_the_run_first(tiny_model_dir, tmp_path, capsys):
    """512 positions: a prompt of some 5 tokens, a demonstration of 600."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "What is w1 ?", "solution": "w2 " * 600}) + "\n")
    settings = [f"model.name={tiny_model_dir}", f"data.source={data}", "data.max_prompt_length=32", *ALONE]
    for name in ([], [f"teacher.name={tiny_model_dir}"]):
        file = tmp_path / "config.yaml"
        file.write_text("{}")
        words = [*settings, "sampling.max_completion_length=10", "teacher.demonstration=solution", *name]
        assert main([str(file), f"run_dir={tmp_path / 'run'}", *words]) == 1
        assert "shorten demonstrations" in capsys.readouterr().err


def test_a_teacher_of_its_own_may_read_more_than_the_policy_can(tiny_model_dir, other_model_dir, tmp_path):
    """The policy has 512 positions and the teacher 2,048: only the latter reads 600 tokens."""
    wide = shutil.copytree(other_model_dir, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "What is w1 ?", "solution": "w2 " * 600}) + "\n")
    (tmp_path / "config.yaml").write_text("{}")
    words = [f"model.name={tiny_model_dir}", "model.dtype=fp32", f"data.source={data}", *ALONE]
    words += ["data.max_prompt_length=32", "sampling.max_completion_length=8", "engine.name=transformers"]
    words += ["train={steps: 1, prompts_per_step: 1, group_size: 2}", f"run_dir={tmp_path / 'run'}"]
    teacher = {"name": str(wide), "dtype": "fp32", "demonstration": "solution"}
    assert main([str(tmp_path / "config.yaml"), *words, f"teacher={json.dumps(teacher)}"]) == 0
