"""Calls a reward function as TRL does and checks what it returns."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewards.plugins import RewardFunction
from rl.types import Reason, Reward

ABSTAINING = frozenset({Reason.INFRA_ERROR, Reason.BAD_GOLD, Reason.NOT_APPLICABLE})
MAX_SCORE = 1e9


class BadValue(Exception):
    """A reward function did not return one finite number, None or Reward per completion."""


@dataclass(frozen=True)
class TrainerState:
    """The part of TRL's `trainer_state` that reward functions can read.

    Attributes:
        global_step: steps that the policy had done when the newest token of the call was sampled.
        max_steps: steps of the whole run; -1: unknown.
    """

    global_step: int
    max_steps: int = -1


def arguments(
    reward: RewardFunction,
    prompts: Sequence[Any],
    *,
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None,
    columns: Mapping[str, Sequence[Any]],
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The keyword arguments of one call: TRL's own, the columns that the function takes, then its options.

    Args:
        extras: `trainer_state`, `log_extra` and `log_metric` of the calling trainer; by default the state is
            None and logging does nothing.
    """
    given = {
        "prompts": list(prompts),
        "completions": list(completions),
        "completion_ids": completion_ids,
        "completion_facts": None,
        "trainer_state": None,
        "log_extra": _ignore,
        "log_metric": _ignore,
        **(extras or {}),
    }
    taken = {name: value for name, value in given.items() if name in reward.given}
    return {n: list(v) for n, v in columns.items() if reward.takes(n)} | taken | dict(reward.options)


def _ignore(*_: Any, **__: Any) -> None: ...


def grade(
    reward: RewardFunction, prompts: Sequence[Any], *, completions: Sequence[Any], **given: Any
) -> list[Reward]:
    """Calls the function, with `arguments` of all that is given, in this thread; it may be async.

    Raises:
        BadValue: it did not return one finite number, None or Reward per completion, as a list.
    """
    values = reward.fn(**arguments(reward, prompts, completions=completions, **given))
    if inspect.isawaitable(values):
        values = asyncio.run(_wait_for(values))
    return [to_reward(reward.name, value) for value in check_length(reward.name, values, len(completions))]


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def check_length(name: str, values: Any, num_completions: int) -> list[Any]:
    """The values as a list.

    Raises:
        BadValue: they are not a list (or tuple, array, tensor), or not one value per completion.
    """
    if isinstance(values, str | bytes | Mapping | Reward) or not hasattr(values, "__len__"):
        raise BadValue(
            f"{name} returned {type(values).__name__}; expected a list of {num_completions} numbers or None, "
            "one per completion"
        )
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(listed, list) or len(listed) != num_completions:
        shape = len(listed) if isinstance(listed, list) else "no"
        raise BadValue(
            f"{name} returned {shape} values; expected {num_completions} numbers or None, one per completion"
        )
    return listed


def to_reward(name: str, value: Any) -> Reward:
    """One returned value as a Reward. None means that the reward does not apply to this sample (TRL).

    Raises:
        BadValue: the value is neither None, a Reward nor a finite number.
    """
    if value is None:
        return Reward(None, Reason.NOT_APPLICABLE)
    if isinstance(value, Reward):
        if value.score is None:
            if value.reason in ABSTAINING:
                return value
            return Reward(
                None, Reason.NOT_APPLICABLE, value.detail or value.reason, value.extracted, value.elapsed_ms
            )
        number, rest = value.score, value
    else:
        number: Any = value
        rest = Reward(None)
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # it may be a numpy or torch scalar
        number = number.item() if hasattr(number, "item") else number
    if not isinstance(number, int | float) or not abs(number) <= MAX_SCORE:
        kind = type(number).__name__
        raise BadValue(f"{name} returned {number!r:.60} ({kind}); expected a number within +-{MAX_SCORE:g}")
    for turn in rest.turns:
        if turn is not None and not (isinstance(turn, int | float) and abs(turn) <= MAX_SCORE):
            raise BadValue(f"{name} gave a turn {turn!r:.60}; expected None or within +-{MAX_SCORE:g}")
    return replace(rest, score=float(number))
