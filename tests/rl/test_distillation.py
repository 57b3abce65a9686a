"""Distillation: divergences over top-k ids and the rest, the sampled reverse KL, teachers, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from recipes.kinds import size_of
from recipes.models import teacher_model
from rl.batch import pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.config.teacher import TeacherConfig
from rl.losses import LossInputs, policy_loss
from rl.model.head import asked_logprobs
from rl.packed_check import probe_batch
from rl.plan.memory import training_parts
from rl.policy import Scores
from rl.teacher import DIVERGENCES, Teacher, check_tokenizers, lesson
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from tests.conftest import word_tokenizer
from tests.rl.families import save_tiny
from tests.rl.taught import ALONE
from tests.scoring import alone, prepared, relative_error

KINDS = ["sampled", *DIVERGENCES]


def make(folder, teacher, kind="sampled", *overrides, top_k=5):
    """A policy, its teacher, and the config of a run without rewards."""
    section = f"teacher={{name: {teacher}, dtype: fp32, divergence: {kind}, top_k: {top_k}}}"
    config = load_config(None, [f"model.name={folder}", "model.dtype=fp32", *ALONE, section, *overrides])
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=config.sampling.temperature)
    assert policy.settle_attention() is None
    model = teacher_model(config.teacher)
    return policy, Teacher(config.teacher, model, policy, longest=64, note=print), config


def logs(*shares: float) -> Float[Tensor, "1 _"]:
    return torch.tensor([shares], dtype=torch.float64).log()


def test_divergences_over_two_outcomes_by_hand():
    teacher, student = logs(0.75, 0.25), logs(0.5, 0.5)
    expected = {
        "forward": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "reverse": 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2),
        # m = (0.625, 0.375)
        "jsd": (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3) + 0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))
        / 2,
    }
    for kind, value in expected.items():
        assert DIVERGENCES[kind](teacher, student).item() == pytest.approx(value, rel=1e-12)


def test_a_cut_without_the_rest_would_reward_fleeing_from_the_teacher():
    """Two of four ids: the last outcome keeps the divergence between 0 and that of the whole."""
    teacher, student = logs(0.4, 0.3, 0.2, 0.1), logs(0.2, 0.15, 0.4, 0.25)
    cut = [torch.cat([x[:, :2], x[:, 2:].logsumexp(1, keepdim=True)], 1) for x in (teacher, student)]
    whole, with_rest, without = (
        DIVERGENCES["reverse"](t, s).item()
        for t, s in ((teacher, student), cut, (teacher[:, :2], student[:, :2]))
    )
    assert whole == pytest.approx(0.35 * math.log(0.5) + 0.4 * math.log(2) + 0.25 * math.log(2.5), rel=1e-9)
    assert with_rest == pytest.approx(0.35 * math.log(0.5) + 0.65 * math.log(0.65 / 0.3), rel=1e-9)  # 0.2600
    assert without == pytest.approx(0.35 * math.log(0.5), rel=1e-9)  # -0.2426: below a perfect student's 0
    assert 0 < with_rest < whole and without < 0


def test_the_rest_is_summed_and_not_subtracted_from_one(tiny_model_dir):
    """A rest of 1e-12 would be lost beside 1 in fp32. Expected: fp64 softmax of the same logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) * 20
    logits = model.lm_head(hidden).double() / 0.7
    ids = logits.topk(3).indices
    logprobs, rest = asked_logprobs(model, hidden, ids, temperature=0.7)
    whole = logits.log_softmax(-1)
    expected = whole.scatter(-1, ids, -torch.inf).logsumexp(-1)
    assert expected.min() < math.log(1e-9)
    torch.testing.assert_close(rest.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprobs.double(), whole.gather(-1, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_top_k_of_the_whole_vocabulary_is_the_exact_divergence(tiny_model_dir, other_model_dir, kind):
    """Value and gradient, against autograd of torch's own kl_div on the logits of transformers."""
    policy, teacher, config = make(tiny_model_dir, other_model_dir, kind, top_k=105)
    drawn = prepared(policy, probe_batch(policy.model))
    taught = teacher.score(drawn)
    scores = policy.score(drawn, ids_LK=taught.ids_LK)
    num = len(scores.logprobs_L)
    given = {"weights_L": torch.full((num,), 1 / num), "mask_L": torch.ones(num, dtype=torch.bool)}
    _, loss, metrics = lesson(config.teacher, taught, scores, old_L=scores.logprobs_L, **given)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in policy.trainable()}
    policy.scorer.zero_grad()
    policy.set_packed(False)
    t, s = (
        torch.cat([model(input_ids=ids[None]).logits[0, n - 1 : -1] for ids, n, _ in drawn.batch.sequences()])
        for model in (AutoModelForCausalLM.from_pretrained(other_model_dir), policy.model)
    )
    t, s = t.detach().log_softmax(-1), s.log_softmax(-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")

    m = (t.exp() / 2 + s.exp() / 2).log()
    expected = {
        "forward": lambda: kl(t, s),
        "reverse": lambda: kl(s, t),
        "jsd": lambda: (kl(t, m) + kl(s, m)) / 2,
    }
    value = expected[kind]()
    assert loss.item() == pytest.approx(value.item(), rel=1e-4) and value > 0.05
    value.backward()
    for name, p in policy.trainable():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)
    assert metrics["teacher/tail"][0] < 1e-20


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_gives_loss_and_gradient_zero(
    tiny_model_dir, ragged_groups, gradients, kind
):
    """Bitwise for the sampled log-ratio. A divergence's gradient is a sum of terms that cancel: < 1e-7."""
    groups, advantages = ragged_groups()
    zeros = [[0.0] * len(row) for row in advantages]
    policy, teacher, config = make(tiny_model_dir, tiny_model_dir, kind)
    found = gradients(policy, config, groups, zeros, teacher=teacher)
    largest = max(g.abs().max().item() for g in found.values())
    assert len(found) == len(policy.trainable())
    assert largest == 0.0 if kind == "sampled" else largest < 1e-7
    (batch,) = pack(groups, zeros, pack_rules(config))
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    result = update_policy(policy, optimizer, [batch], config.loss, world=alone(), teacher=teacher)
    assert abs(result.metrics["policy/loss"]) < 1e-7 and result.metrics["teacher/kl"] == 0.0


def test_the_sampled_gradient_is_that_of_the_reverse_kl_on_average():
    """All 9 sequences of two tokens of a vocabulary of 3, each with its probability, in fp64. The prefix that
    a token follows is taken as given, as in every policy gradient without returns.
    """
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    student, teacher = tables[0].requires_grad_().log_softmax(-1), tables[1].log_softmax(-1)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    contexts, tokens = (
        torch.tensor([x for p in pairs for x in q(*p)]) for q in (lambda a, b: (3, a), lambda a, b: (a, b))
    )
    logprobs = student[contexts, tokens]
    weights = logprobs.detach().view(9, 2).sum(1).exp().repeat_interleave(2)
    mask = torch.ones(18, dtype=torch.bool)
    scores, taught = Scores(logprobs, logprobs), Scores(teacher[contexts, tokens], logprobs)
    config = load_config(None, [*ALONE, "teacher={name: x, coef: 0.5}", "loss.sampler_correction=null"])
    advantages, *_ = lesson(config.teacher, taught, scores, old_L=logprobs, weights_L=weights, mask_L=mask)
    inputs = LossInputs(logprobs, advantages, mask, torch.arange(9).repeat_interleave(2), 9, weights, 1.0)
    policy_loss(inputs, config=config.loss).loss.backward(retain_graph=True)
    ours, tables[0].grad = tables[0].grad.clone(), None
    kl = (student.exp() * (student - teacher)).sum(-1)
    visits = torch.cat([student[3].detach().exp(), torch.ones(1, dtype=torch.float64)])
    (0.5 * (visits * kl).sum()).backward()
    torch.testing.assert_close(ours, tables[0].grad, rtol=1e-10, atol=1e-12)
    assert ours.abs().max() > 0.01
    estimate = (weights * (logprobs.detach() - taught.logprobs_L)).sum()
    torch.testing.assert_close(estimate, (visits * kl).sum().detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["sampled", "forward", "reverse"])
def test_a_toy_converges_to_its_teacher(tmp_path, kind):
    """Full batches: every id of 12 once after each of three prompts; what is sampled is weighed by the
    policy's probability of it. Top-k has 11 ids, and so the rest is one id.
    """
    policy, teacher, config = make(*(_toy(tmp_path, seed) for seed in (0, 1)), kind, top_k=11)
    loss = config.loss.model_copy(update={"sampler_correction": None})
    optimizer, world = torch.optim.Adam([p for _, p in policy.trainable()], lr=0.05), alone()
    ends = [Completion([i], [0.0], [True], "stop", [VersionSpan(0, 1)]) for i in range(12)]
    groups = [ScoredGroup(Group(Prompt(f"{p}", "", (p,)), ends), [Reward(None)] * 12) for p in (5, 6, 7)]
    (batch,) = pack(groups, [[0.0] * 12] * 3, pack_rules(config))
    (micro,) = batch.micro_batches
    drawn = prepared(policy, micro)
    log_t, kls = teacher.score(drawn).logprobs_L.view(3, 12), []
    for _ in range(60):
        with torch.no_grad():
            log_s = policy.score(drawn).logprobs_L.view(3, 12)
        kls.append(DIVERGENCES["reverse"](log_t, log_s).mean().item())
        if kind == "sampled":
            micro.weights_L = log_s.flatten().exp() / 3
        update_policy(policy, optimizer, [batch], loss, world=world, teacher=teacher)
    assert kls[0] > 0.3 and kls[-1] < 1e-3


def _toy(folder, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    target = folder / f"toy{seed}"
    words = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *"abcdefg"]
    tokenizer = word_tokenizer(target, words)
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=12, initializer_range=0.4, **size, **ends)).save_pretrained(
        target
    )
    return target


@pytest.mark.parametrize("kind", ["sampled", "reverse"])
def test_the_gradient_of_a_teacher_does_not_depend_on_how_work_is_cut(
    tiny_model_dir, other_model_dir, ragged_groups, gradients, kind
):
    """Budget, order of groups, shared prompts; with advantages of rewards beside it, some of them 0."""
    groups, advantages = ragged_groups()
    many = "train.token_budget=40"
    policy, teacher, config = make(tiny_model_dir, other_model_dir, kind, "loss.clip_high=4.0")
    cut = config.model_copy(update={"train": config.train.model_copy(update={"token_budget": 40})})
    batch = pack(groups, advantages, pack_rules(cut))[0]
    assert len(batch.micro_batches) > 5, many
    assert sum(len(m.rows) for m in batch.micro_batches) == batch.num_sequences
    whole = gradients(policy, config, groups, advantages, teacher=teacher)
    found = {
        "budget": gradients(policy, cut, groups, advantages, teacher=teacher),
        "order": gradients(policy, config, groups[::-1], advantages[::-1], teacher=teacher),
    }
    policy.set_packed(False)
    teacher.scorer.set_packed(False)
    found["rows"] = gradients(policy, config, groups, advantages, teacher=teacher)
    for name, other in found.items():
        assert relative_error(whole, other) <= 1e-5, name


def test_a_teacher_beside_a_packed_policy_computes_no_more_than_the_budget(tiny_model_dir, tmp_path):
    """One completion a prompt: 20 short rows and a long one are 126 columns packed, and 1,302 padded."""
    save_tiny("lfm2", tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    policy, teacher, config = make(tiny_model_dir, tmp_path, "sampled", "train.token_budget=130")
    assert teacher.scorer.packing_fault is not None
    ids = [5 + i % 90 for i in range(60)]
    made = [Completion(ids[:n], [-1.0] * n, [True] * n, "stop", [VersionSpan(0, n)]) for n in (60, *[1] * 20)]
    groups = [ScoredGroup(Group(Prompt(f"{i}", "", (3, 4)), [c]), [Reward(0.0)]) for i, c in enumerate(made)]
    (batch,) = pack(groups, [[0.0]] * 21, pack_rules(config))
    seen = []
    teacher.scorer.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: seen.append(ids[0]))
    for micro_batch in batch.micro_batches:
        teacher.score(prepared(policy, micro_batch))
    assert max(ids.numel() for ids in seen) <= 130
    assert sum(ids.numel() for ids in seen) == 62 + 20 * 3


def test_later_passes_keep_the_advantage_of_the_first(tiny_model_dir, other_model_dir, ragged_groups):
    """The sampled log-ratio is that of the policy that the step began with: two passes report it twice."""
    groups, advantages = ragged_groups()
    found = []
    for num in (1, 2):
        policy, teacher, config = make(tiny_model_dir, other_model_dir)
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.5)
        batches = pack(groups, advantages, pack_rules(config))
        given = {"world": alone(), "teacher": teacher, "num_epochs": num}
        found.append(update_policy(policy, optimizer, batches, config.loss, **given).metrics)
    assert found[1]["teacher/kl"] == pytest.approx(found[0]["teacher/kl"], rel=1e-6)
    assert found[1]["policy/ratio_max"] > 1.001


def test_padding_of_a_larger_teacher_counts_among_the_rest(tiny_model_dir, other_model_dir, tmp_path):
    """Qwen2.5 has 151,936 rows in small models and 152,064 in large ones, with one tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(other_model_dir)
    model.resize_token_embeddings(110)
    with torch.no_grad():
        model.get_input_embeddings().weight[105:] = model.get_input_embeddings().weight[:5] * 3
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    policy, teacher, _ = make(tiny_model_dir, tmp_path, "forward", top_k=200)
    drawn = prepared(policy, probe_batch(policy.model))
    taught = teacher.score(drawn)
    assert taught.ids_LK.shape[1] == 105 and taught.ids_LK.max() == 104
    assert taught.rest_L.exp().max() > 0.1
    total = taught.logprobs_LK.exp().sum(-1) + taught.rest_L.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    with pytest.raises(ValueError, match="has 105 embedding rows and the model 110, which may sample"):
        make(tmp_path, tiny_model_dir)


def test_a_mixture_of_experts_teaches_a_dense_model(tiny_model_dir, tmp_path):
    """Against the mixture's own logits, at a temperature of 0.8."""
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    mixture = MixtralForCausalLM(
        MixtralConfig(vocab_size=105, initializer_range=0.3, **size, **experts, **ends)
    )
    mixture.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    policy, teacher, _ = make(tiny_model_dir, tmp_path, "sampled", "sampling.temperature=0.8")
    drawn = prepared(policy, probe_batch(policy.model))
    expected = [
        (mixture(input_ids=ids[None]).logits[0, n - 1 : -1] / 0.8).log_softmax(-1).gather(-1, ids[n:, None])
        for ids, n, _ in drawn.batch.sequences()
    ]
    torch.testing.assert_close(
        teacher.score(drawn).logprobs_L, torch.cat(expected)[:, 0].detach(), rtol=1e-4, atol=1e-4
    )


def test_a_teacher_with_another_tokenizer_is_refused(tiny_model_dir, tmp_path):
    """As many ids, two of them swapped: sizes alone would not tell."""
    ours = AutoTokenizer.from_pretrained(tiny_model_dir)
    words = [word for word, _ in sorted(ours.get_vocab().items(), key=lambda pair: pair[1])]
    words[20], words[21] = words[21], words[20]
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, words)
    model = teacher_model(TeacherConfig(name=str(tmp_path)))
    with pytest.raises(
        ValueError, match=r"another tokenizer: 2 ids differ, the first is 20, 'w15' of the model"
    ):
        check_tokenizers(model, ours, 64)
    with pytest.raises(ValueError, match=r"may have 600 tokens.* has 512 positions"):
        check_tokenizers(teacher_model(TeacherConfig(name=str(tiny_model_dir))), ours, 600)
    with pytest.raises(
        ValueError, match=r"model 'nowhere/at-all': there is no such folder.*HF_HUB_OFFLINE is set"
    ):
        check_tokenizers(teacher_model(TeacherConfig(name="nowhere/at-all")), ours, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rewards.functions=[]"], "pay nothing and there is no teacher"),
        (["rewards.functions=[{name: math, weight: 0}]"], "pay nothing and there is no teacher"),
        ([*ALONE, "teacher.name=x", "advantage.dynamic_sampling={}"], "without paid rewards all are equal"),
        (["teacher.name=x", "loss.name=gspo"], "gspo has one ratio per sequence"),
        (["teacher={name: x, top_k: 0}"], "teacher.top_k"),
        (["teacher.top_k=4"], "teacher.name"),
        (["diffusion={}", "teacher.name=x"], "a diffusion model has no such log-probs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


def test_what_a_teacher_holds_is_planned(tiny_model_dir, other_model_dir):
    """Weights in bf16, and 12 bytes for each of 5 ids of 2 x 3 x 10 tokens."""
    more = ["train.prompts_per_step=2", "train.group_size=3", "sampling.max_completion_length=10"]
    held = {}
    for kind in ("sampled", "jsd"):
        section = f"teacher={{name: {other_model_dir}, divergence: {kind}, top_k: 5}}"
        config = load_config(None, [f"model.name={tiny_model_dir}", *ALONE, section, *more])
        parts = training_parts(size_of(config, config.model), config, 1000)
        held[kind] = {part.name: part.bytes for part in parts}["teacher"]
    weights = 2 * AutoModelForCausalLM.from_pretrained(other_model_dir).num_parameters()
    assert held == {"sampled": weights, "jsd": weights + 2 * 3 * 10 * 5 * 12}


@pytest.mark.parametrize(
    ("dtype", "lora"), [("bf16-mixed", "null"), ("bf16-mixed", "{r: 4}"), ("bf16", "null")]
)
def test_narrow_numbers_teach_what_wide_ones_do(tiny_model_dir, other_model_dir, ragged_groups, dtype, lora):
    """The mean divergence over 240 tokens, policy and teacher in bf16, is that of fp32 up to rounding."""
    groups, advantages = ragged_groups()
    found = []
    for name, settings in (("fp32", []), ("bf16", [f"model.dtype={dtype}", f"model.lora={lora}"])):
        policy, teacher, config = make(
            tiny_model_dir, other_model_dir, "reverse", f"teacher.dtype={name}", *settings
        )
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.5)
        batches = pack(groups, advantages, pack_rules(config))
        given = {"world": alone(), "teacher": teacher}
        found.append(update_policy(policy, optimizer, batches, config.loss, **given))
    wide, narrow = (x.metrics for x in found)
    assert narrow["teacher/divergence"] == pytest.approx(wide["teacher/divergence"], rel=0.05)
    assert narrow["teacher/tail"] == pytest.approx(wide["teacher/tail"], rel=0.05)
    assert found[1].num_updates == 1
