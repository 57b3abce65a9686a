"""Every metric of a run, defined once: name, unit, meaning and healthy range; and the file of their values.

Names are `section/name`. A name that is not in `METRICS` is an error: the plot of a misspelt metric would
stay empty. Only `reward/` is open, for parts of a run's rewards: `reward/<part>/mean`, `reward/<part>/std`.
A run whose policy or loss has its own metrics gives their names to `MetricsLog`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rl.store.rows import RowLog

LEAST_SPREAD = 1e-9  # deviation of a reward part's scores; that of equal scores is exactly 0
CONSTANT_HINT = (
    "it teaches nothing: check what it reads (a completion of a chat is a list of messages: see "
    "rewards/__init__.py), or drop it"
)
Z_95 = 1.959963984540054  # the normal distribution has 95 % of its mass within this many standard deviations


@dataclass(frozen=True, slots=True)
class Metric:
    """What a number means and when it is worth a look.

    Attributes:
        low, high: the least and the greatest healthy value, inclusive.
        broken_below, broken_above: the run is broken, not merely unusual, beyond these.
        told_at_once: a run warns of values out of range, and does not wait until it is broken.
        patience: consecutive values that must be out of range before a rule fires; single steps are noisy.
        hint: what to do when it is out of range.
    """

    name: str
    unit: str
    description: str
    low: float = -math.inf
    high: float = math.inf
    hint: str = ""
    broken_below: float = -math.inf
    broken_above: float = math.inf
    patience: int = 5
    told_at_once: bool = False

    def is_healthy(self, value: float) -> bool:
        return self.low <= value <= self.high  # never for NaN

    def is_broken(self, value: float) -> bool:
        return not self.broken_below <= value <= self.broken_above


# Bounds: entropy, KL, clip fraction, truncation and log-prob gap follow the tables of axolotl's
# docs/training_stability.qmd and NeMo-RL's docs/guides/grpo.md, widened where small models (0.1B to 1.5B) sit
# outside them without harm.
# fmt: off
_ALL = (
    Metric("reward/mean", "score", "mean reward of the step's completions, abstentions left out"),
    Metric("reward/std", "score", "standard deviation of the reward over the step's completions"),
    Metric("reward/abstained", "share", "completions whose grader gave no verdict",
           high=0.05, broken_above=0.5,
           hint="read the reasons in the group browser: graders time out, crash, return None or meet "
                "unusable answers"),
    Metric("graders/faults", "share",
           "graded completions on which a grader hung, died, raised or returned nonsense",
           high=0.01, patience=1,
           hint="read the reasons in the group browser; `cohort score` runs a reward on saved rows"),
    Metric("groups/all_right", "share", "groups whose completions all have the best reward: too easy"),
    Metric("groups/all_wrong", "share", "groups whose completions all have the worst reward: too hard"),
    Metric("groups/without_spread", "share", "groups whose rewards are all equal; they give no gradient",
           high=0.8, broken_above=0.999,
           hint="all right: harder prompts; all wrong: easier prompts, a larger train.group_size, or check "
                "the grader; advantage.dynamic_sampling replaces such groups"),
    Metric("completion/length_mean", "tokens", "mean completion length"),
    Metric("completion/length_max", "tokens", "longest completion"),
    Metric("completion/length_min", "tokens", "shortest completion"),
    Metric("completion/truncated_share", "share", "completions cut by their length, or an episode's limits",
           high=0.3, broken_above=0.95,
           hint="raise sampling.max_completion_length, or the environment's max_turns and max_turn_length; "
                "if it rises with the reward, length is rewarded"),
    Metric("completion/aborted", "share", "completions that the engine failed to finish",
           high=0.05, broken_above=0.5,
           hint="read the engine's log: out of memory, time-outs or a restarted server"),
    Metric("episode/turns", "turns", "mean turns of an episode"),
    Metric("episode/wait_share", "share",
           "time of sampling in which the engine had no turn to sample, and waited for environments"),
    Metric("tools/calls", "calls", "mean calls of tools in an episode"),
    Metric("tools/failed", "share", "calls that were malformed, or whose tool raised", high=0.5,
           hint="read such episodes in the report (failed tool); does environment.calls fit the model?"),
    Metric("policy/entropy", "nats/token", "mean entropy of the policy's distribution of each trained token",
           low=0.02, high=2.5, broken_below=0.001,
           hint="low: the policy has collapsed, lower optimizer.lr, raise loss.clip_high or entropy_coef; "
                "high: it drifts to noise, lower optimizer.lr"),
    Metric("policy/kl", "nats/token", "KL divergence from the reference, by loss.kl_estimator",
           low=-0.5, high=0.5, broken_above=10.0,
           hint="lower optimizer.lr or raise loss.kl_coef; if the held-out accuracy is flat, stop: the "
                "reward is being gamed"),
    Metric("teacher/kl", "nats/token", "mean log policy - log teacher of sampled tokens: reverse KL"),
    Metric("teacher/divergence", "nats/token", "teacher.divergence over its top-k ids and all others as one"),
    Metric("teacher/tail", "share", "the teacher's mass outside its top-k ids",
           high=0.2, hint="raise teacher.top_k: the divergence counts all other ids as one"),
    Metric("policy/clip_low", "share", "trained tokens whose ratio was clipped at 1 - clip_low"),
    Metric("policy/clip_high", "share", "trained tokens whose ratio was clipped at 1 + clip_high"),
    Metric("policy/clip_fraction", "share", "trained tokens whose ratio was clipped; 0 if on-policy",
           high=0.2,
           hint="lower optimizer.lr, train.num_epochs or num_minibatches: a batch moves the policy too far"),
    Metric("policy/ratio_mean", "ratio", "mean importance ratio, policy / old policy",
           low=0.8, high=1.25, broken_below=0.2, broken_above=5.0,
           hint="lower optimizer.lr; with one update per batch it must be 1"),
    Metric("policy/ratio_max", "ratio", "greatest importance ratio of a token"),
    Metric("policy/grad_norm", "norm", "greatest length of the step's gradients before clipping",
           low=1e-4, high=20.0, broken_above=1e4,
           hint="zero: no group has spread; a spike precedes divergence: lower optimizer.lr"),
    Metric("policy/lr", "rate", "learning rate of the step"),
    Metric("policy/loss", "loss", "the loss that was differentiated; near 0 is normal on-policy"),
    Metric("sampler/ratio_mean", "ratio", "mean policy / sampler of the sampled tokens; 1 if they agree",
           low=0.95, high=1.05, broken_below=0.5, broken_above=2.0,
           hint="the sampler has stale weights, another temperature or a coarser dtype than the policy; with "
                "train.max_staleness the policy moves too far in a step: lower optimizer.lr"),
    Metric("sampler/ratio_min", "ratio", "least policy / sampler ratio of a token"),
    Metric("sampler/ratio_max", "ratio", "greatest policy / sampler ratio of a token"),
    Metric("sampler/share_beyond", "share", "tokens whose policy / sampler ratio was cut or masked",
           high=0.05, broken_above=0.5,
           hint="the sampler and the policy disagree: compare dtypes, and look at sync/canary_gap_mean"),
    Metric("sampler/logprob_gap_mean", "nats", "mean |policy - sampler| log-prob of a token",
           high=0.1, broken_above=1.0, patience=1, told_at_once=True,
           hint="the engine samples another distribution than the policy trains: above 1 its weights are "
                "wrong or stale (engine.verify_sync); below, engine.dtype is coarse, or the engine computes "
                "this family differently: compare with engine.name=transformers"),
    Metric("sampler/logprob_gap_max", "nats", "greatest |policy - sampler| log-prob of a token"),
    Metric("sampler/mismatch_kl", "nats/token", "KL from policy to sampler; 0.001 is usual in bf16",
           high=0.02, broken_above=0.5,
           hint="as for sampler/logprob_gap_mean; keep loss.sampler_correction; lower train.max_staleness"),
    Metric("sync/canary_gap_mean", "nats", "mean log-prob gap on fixed tokens after a sync",
           high=0.15, broken_above=0.2, patience=1, told_at_once=True,
           hint="the engine does not hold the weights it was sent; do not trust the steps after this one"),
    Metric("sync/canary_gap_max", "nats", "greatest log-prob gap on fixed tokens after a sync",
           high=1.0, broken_above=1.6, patience=1, hint="as for sync/canary_gap_mean"),
    Metric("sync/seconds", "s", "time to bring new weights to the engine"),
    Metric("sync/seconds_inspect", "s", "of sync/seconds, for fingerprints of what is sent"),
    Metric("sync/seconds_send", "s", "of sync/seconds, until the engine has loaded everything"),
    Metric("sync/seconds_fingerprints", "s", "of sync/seconds, for fingerprints of what the engine holds"),
    Metric("sync/seconds_canary", "s", "for log-probs of fixed tokens on both sides, or beside sampling"),
    Metric("staleness/mean", "steps", "mean age of the weights that sampled a token of the batch"),
    Metric("staleness/max", "steps", "greatest age of the weights that sampled a token of the batch"),
    Metric("rollout/in_flight", "completions", "completions in flight when the batch was complete"),
    Metric("rollout/replaced", "groups", "groups without spread that dynamic sampling replaced"),
    Metric("time/sample", "s", "time in which the trainer sampled, or waited for samples"),
    Metric("time/score", "s", "time spent waiting for graders"),
    Metric("time/pack", "s", "time spent building the batch"),
    Metric("time/train", "s", "time spent in forward, backward and optimizer"),
    Metric("time/sync", "s", "time spent bringing weights to the engine"),
    Metric("time/save", "s", "time spent saving after the previous step"),
    Metric("time/eval", "s", "time spent on held-out prompts after the previous step"),
    Metric("time/step", "s", "whole step, without saving and held-out prompts"),
    Metric("tokens/completion", "tokens", "tokens sampled in the step"),
    Metric("tokens/trained", "tokens", "tokens that had a gradient"),
    Metric("tokens/per_second", "tokens/s", "sampled tokens per second of the whole step"),
    Metric("heldout/accuracy", "share", "accuracy on held-out prompts"),
    Metric("heldout/low", "share", "lower end of its 95 % Wilson interval"),
    Metric("heldout/high", "share", "upper end of its 95 % Wilson interval"),
    Metric("diffusion/bound", "nats/token", "bound on -log p per maskable token of the step, estimated"),
    Metric("diffusion/packed_tokens", "tokens", "tokens of the step's forward passes, copies included"),
    Metric("diffusion/scored_share", "share", "masked and scored tokens among them"),
    Metric("diffusion/tokens_per_second", "tokens/s", "packed tokens per second of the whole step"),
    Metric("moe/balance", "loss", "balance loss before its coefficient, mean of layers; switch: even is 1"),
    Metric("moe/z_loss", "nats²", "mean squared log-sum-exp of the routers' logits"),
    Metric("moe/router_entropy", "nats/token", "mean entropy of the routers' probabilities"),
    Metric("moe/load_entropy", "share", "entropy of the experts' load / of an even load; mean of layers"),
    Metric("moe/max_violation", "ratio", "load of the busiest expert / even load - 1; mean of layers"),
    Metric("moe/max_violation_layer", "ratio", "load of the busiest expert / even load - 1; worst layer"),
    Metric("moe/violation_growth", "ratio", "moe/max_violation / its value in the first step, or 0.5 if less",
           high=2.0, told_at_once=True,
           hint="experts are used less evenly than at the start: moe.balance=switch, or moe.router=freeze"),
    Metric("moe/min_load", "ratio", "load of the idlest expert of all layers / even load"),
    Metric("moe/dead_experts", "share", "experts that none of the last few thousand tokens chose",
           high=0.05, patience=3, told_at_once=True,
           hint="experts collapse: moe.balance=switch, a larger moe.balance_coef, or moe.router=freeze"),
    Metric("moe/flip_rate", "share", "replayed tokens, by layer, with other experts chosen in training",
           high=0.1, told_at_once=True,
           hint="policy and engine choose other experts: moe.router_fp32=true, or engine.dtype=float32; "
                "sampler/logprob_gap_mean shows what replay leaves of it"),
    Metric("moe/replayed", "share", "completion tokens, layer by layer, whose experts were replayed"),
    Metric("moe/start_overlap", "share", "experts of fixed tokens that are those of the first step (Jaccard)",
           low=0.8, told_at_once=True,
           hint="routing drifts from the model that the run began with: moe.router=freeze, a lower "
                "optimizer.lr, or moe.replay=engine"),
    Metric("memory/peak", "GiB", "greatest memory held by the training process"),
    Metric("steps/skipped", "steps", "optimizer steps left out so far: loss or gradient was not finite",
           high=0.0, patience=1,
           hint="lower optimizer.lr; try model.dtype=fp32; train.max_bad_steps in a row stop the run"),
)
# fmt: on
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
assert len(METRICS) == len(_ALL), "a metric is defined twice"
OWN_NAME = re.compile(r"[\w.-]+(/[\w.-]+)+", re.ASCII)


def metric_of(name: str, own: Mapping[str, Metric] = MappingProxyType({})) -> Metric:
    """The definition of a metric; for the parts of a run's rewards, the spread has a range: above 0.

    Raises:
        ValueError: the name is unknown; the message has the nearest known ones.
    """
    if metric := METRICS.get(name) or own.get(name):
        return metric
    if name.startswith("reward/") and len(name) > len("reward/"):
        part, _, statistic = name.removeprefix("reward/").rpartition("/")
        said = f"{statistic} of the reward part {part}" if part else f"reward part {statistic}"
        spread = {"low": LEAST_SPREAD, "hint": CONSTANT_HINT} if part and statistic == "std" else {}
        return Metric(name, "score", said, **spread)
    near = difflib.get_close_matches(name, [*METRICS, *own], n=3, cutoff=0.5)
    raise ValueError(
        f"unknown metric {name!r}; "
        + (f"did you mean {' or '.join(near)}? " if near else "")
        + "rl/store/metrics.py lists every metric; parts of a reward are named reward/<part>/mean"
    )


def shown_metric(name: str) -> Metric:
    """What a reader sees of a metric: its definition, or only the name for a run's own metric."""
    try:
        return metric_of(name)
    except ValueError:
        return Metric(name, "", name)


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """95 % interval of a share: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) (Wilson 1927).

    `successes` may be fractional, when every prompt was answered several times. Without trials it is (0, 1).
    """
    assert 0 <= successes <= n, f"{successes} successes of {n}"
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z_95 * Z_95
    centre = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class MetricsLog:
    """`metrics.jsonl` of a run folder: one object per line, {"step": 3, "reward/mean": 0.5}, steps rising.

    A value that is not finite is written as null and named in "nonfinite", so nobody takes it for a zero.

    Args:
        own: metrics that this run reports besides `METRICS`.

    Raises:
        ValueError: the name of an own metric is not `section/name`, or is defined already.
    """

    def __init__(self, run_dir: str | Path, own: Iterable[Metric] = ()) -> None:
        self._own: dict[str, Metric] = {}
        for metric in own:
            if not OWN_NAME.fullmatch(metric.name) or metric.name.startswith("reward/"):
                raise ValueError(f"own metric {metric.name!r} must be section/name, such as mixture/balance")
            if metric.name in METRICS or metric.name in self._own:
                raise ValueError(f"own metric {metric.name!r} is defined already; give it another name")
            self._own[metric.name] = metric
        self._rows = RowLog(Path(run_dir) / "metrics.jsonl")
        self.path = self._rows.path
        self.read, self.truncate_after = self._rows.read, self._rows.truncate_after
        self.close = self._rows.close

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row and flushes it.

        Raises:
            ValueError: a name is unknown.
            RuntimeError: the file was removed during the run.
        """
        for name in values:
            metric_of(name, self._own)
        row: dict[str, Any] = {"step": int(step), **{name: float(value) for name, value in values.items()}}
        nonfinite = [name for name in values if not math.isfinite(row[name])]
        row |= dict.fromkeys(nonfinite) | ({"nonfinite": nonfinite} if nonfinite else {})
        self._rows.append(row)


def show_value(name: str, value: float) -> str:
    """A value for a reader, by its unit: "12.5 %", "3 min 20 s", "5,310"; else four significant digits."""
    unit = shown_metric(name).unit
    if not math.isfinite(value):
        return "not finite"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "s":
        return show_seconds(value)
    if unit in ("tokens", "tokens/s", "steps") and abs(value) >= 10:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def show_seconds(seconds: float) -> str:
    """A duration in its two largest units: "0.42 s", "12 s", "3 min 20 s", "2 h 5 min", "4 d 3 h"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"
