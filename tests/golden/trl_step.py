"""A step of the installed TRL on given numbers: its own advantages, sampler correction, loss and gradient.

`GRPOTrainer._generate_and_score_completions` and `_compute_loss` run as they are. Three methods that would
need a model or an engine are replaced by the numbers of a `Rollout`: sampling, log-probs, reward functions.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from trl import import_utils

_is_vllm_available = import_utils.is_vllm_available
import_utils.is_vllm_available = lambda *args, **kwargs: False  # no engine is needed, and vllm imports slowly
from trl.trainer import grpo_trainer  # noqa: E402

import_utils.is_vllm_available = _is_vllm_available
grpo_trainer.gather_object = lambda values: values  # one process, without accelerate's global state

F64 = torch.float64
MAX_COMPLETION_LENGTH = 16


@dataclass
class Rollout:
    """B sequences in groups of `group_size`, padded to T.

    Attributes:
        mask_BT: the completion's tokens; trained_BT: those that count in the loss.
        behavior_BT: NaN where the engine gave no log-prob.
        rewards_BK: score of each of K reward functions, NaN where it abstains.
    """

    mask_BT: torch.Tensor
    trained_BT: torch.Tensor
    logprobs_BT: torch.Tensor
    old_BT: torch.Tensor | None
    behavior_BT: torch.Tensor
    reference_BT: torch.Tensor
    entropy_BT: torch.Tensor
    rewards_BK: torch.Tensor
    group_size: int
    weights_K: tuple[float, ...] = (1.0,)


def random_rollout(
    seed, *, num_groups=2, group_size=3, with_old=True, abstain=0.0, num_rewards=1, weights=(1.0,)
):
    """Ragged, ratios around 1, one sequence without trained tokens, one unknown behavior log-prob."""
    g = torch.Generator().manual_seed(seed)
    size, length = num_groups * group_size, 9

    def near(base, spread):
        return base + spread * torch.randn(size, length, generator=g, dtype=F64)

    lengths = torch.randint(2, length + 1, (size,), generator=g)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    trained = mask & (torch.rand(size, length, generator=g) > 0.2)
    trained[:, 0] = True
    trained[1] = False
    old = near(-2.0, 0.5)
    logprobs = near(old, 0.35) if with_old else old
    behavior = near(old, 0.3).float().double()  # TRL reads the engine's log-probs as fp32
    behavior[0, 0] = torch.nan
    rewards = torch.randint(0, 4, (size, num_rewards), generator=g).double() / 2
    rewards = torch.where(torch.rand(size, num_rewards, generator=g) < abstain, torch.nan, rewards)
    return Rollout(
        mask_BT=mask,
        trained_BT=trained,
        logprobs_BT=logprobs.clone().requires_grad_(),
        old_BT=old if with_old else None,
        behavior_BT=behavior,
        reference_BT=near(old, 0.4),
        entropy_BT=near(1.0, 0.1).abs().requires_grad_(),
        rewards_BK=rewards,
        group_size=group_size,
        weights_K=weights,
    )


def trl_trainer(rollout, *, num_micro_batches=1, num_minibatches=1, **options):
    """A GRPOTrainer that holds only what the two methods read; `options` override its settings."""
    trainer = object.__new__(grpo_trainer.GRPOTrainer)
    policy, reference = torch.nn.Identity(), torch.nn.Identity()
    policy.is_gradient_checkpointing = False
    args = SimpleNamespace(
        steps_per_generation=num_micro_batches * num_minibatches,
        gradient_accumulation_steps=num_micro_batches,
        gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=len(rollout.mask_BT),
        delta=options.pop("delta", None),
        use_bias_correction_kl=options.pop("use_bias_correction_kl", False),
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
    )
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        sync_gradients=True,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    entropy_coef = options.pop("entropy_coef", 0.0)
    settings = {
        "model": policy,
        "ref_model": reference,
        "args": args,
        "accelerator": accelerator,
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "processing_class": SimpleNamespace(batch_decode=lambda ids, **kwargs: [""] * len(ids)),
        "environment_factories": None,
        "environments": None,
        "tools": [],
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "num_generations": rollout.group_size,
        "num_iterations": 1 if rollout.old_BT is None else 2,  # 2: TRL keeps the old log-probs
        "current_gradient_accumulation_steps": num_micro_batches,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "reward_weights": torch.tensor(rollout.weights_K),
        "reward_funcs": [None] * len(rollout.weights_K),
        "reward_func_names": [f"reward_{k}" for k in range(len(rollout.weights_K))],
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": 2.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "entropy_coef": entropy_coef,
        "use_adaptive_entropy": False,
        "_entropy_bonus_enabled": entropy_coef != 0.0,
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "log_multimodal": False,
    }
    assert not set(options) - set(settings), f"unknown {set(options) - set(settings)}"
    for name, value in (settings | options).items():
        object.__setattr__(trainer, name, value)
    return trainer


def trl_step(rollout, *, num_micro_batches=1, num_minibatches=1, **options):
    """(what TRL made of the rollout, losses of the optimizer steps, gradients w.r.t. log-probs, metrics)."""
    trainer = trl_trainer(
        rollout, num_micro_batches=num_micro_batches, num_minibatches=num_minibatches, **options
    )
    size = len(rollout.mask_BT)
    rows = slice(0, size)

    def generate(prompts):
        lengths = rollout.mask_BT.sum(1).tolist()
        ids = [[5] * n for n in lengths]
        behavior = [row[:n].tolist() for row, n in zip(rollout.behavior_BT, lengths, strict=True)]
        behavior = [[None if x != x else x for x in row] for row in behavior]
        tools = [row[:n].int().tolist() for row, n in zip(rollout.trained_BT, lengths, strict=True)]
        return [[3]] * size, ids, tools, [""] * size, behavior, {}, None, None

    def logprobs(model, *args, **kwargs):
        if model is trainer.ref_model:
            return rollout.reference_BT[rows], None, None
        if torch.is_grad_enabled():
            return rollout.logprobs_BT[rows], rollout.entropy_BT[rows], None
        return (rollout.logprobs_BT.detach() if rollout.old_BT is None else rollout.old_BT)[rows], None, None

    trainer._generate = generate
    trainer._get_per_token_logps_and_entropies = logprobs
    trainer._calculate_rewards = lambda *args: rollout.rewards_BK
    made = trainer._generate_and_score_completions([{"prompt": "?"}] * size)
    chunks = grpo_trainer.split_tensor_dict(made, num_micro_batches * num_minibatches)
    losses, share = [], size // len(chunks)
    for i, chunk in enumerate(chunks):
        rows = slice(i * share, (i + 1) * share)
        losses.append(trainer._compute_loss(trainer.model, chunk))
    steps = [sum(losses[m * num_micro_batches : (m + 1) * num_micro_batches]) for m in range(num_minibatches)]
    gradients = [torch.autograd.grad(loss, rollout.logprobs_BT, retain_graph=True)[0] for loss in steps]
    return made, steps, gradients, trainer._metrics["train"]
