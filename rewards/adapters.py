"""Rewards to and from other trainers: TRL, verl, OpenRLHF, AReaL.

`as_*` turn a reward of this library (a name or a function, with options) into a callable for the other
trainer. `from_*` are factories that make a reward of the other trainer's function; TRL's need none. Config:

    - {name: verl, options: {function: "my.reward:compute_score"}}
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.completion import completion_text
from rewards.plugins import RewardFunction, find, load_reward
from rewards.pool.calling import grade
from rl.types import Reward

EXTRAS = ("trainer_state", "log_extra", "log_metric")


class as_trl:
    """A reward as TRL's GRPOTrainer calls it: `reward_funcs=[as_trl("math"), as_trl("think_format")]`.

    Group-wise rewards get one call per run of equal prompts, so that the groups of a batch stay apart. TRL's
    own `trainer_state`, `log_extra` and `log_metric` are passed on.
    """

    def __init__(self, reward: str | Callable[..., Any], **options: Any) -> None:
        self._made_of = (reward, options)
        self.reward = load_reward(reward, options)
        self.__name__ = self.reward.name.rpartition(":")[2]

    def __reduce__(self) -> tuple[Any, ...]:
        reward, options = self._made_of
        return functools.partial(as_trl, reward, **options), ()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Raises:
            ValueError: the dataset lacks a column that the reward needs.
        """
        return _scores(self.reward, prompts, completions=completions, ids=completion_ids, columns=columns)


def as_verl(
    reward: str | Callable[..., Any], *, answer: str = "answer", abstain: float = 0.0, **options: Any
) -> Callable[..., dict[str, Any]]:
    """A reward as verl's `compute_score`; `ground_truth` is the column `answer`, `extra_info` the others.

    verl cannot leave a sample out: where the reward abstains, the score is `abstain`, and `reason` says why.
    """
    loaded = load_reward(reward, options)

    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        row = {**(extra_info or {}), "data_source": data_source, answer: ground_truth}
        found = _grade_one(loaded, "", completion=solution_str, ids=[], row=row)
        score = abstain if found.score is None else found.score
        return {"score": score, "reason": str(found.reason), "pred": found.extracted or ""}

    return compute_score


def as_openrlhf(
    reward: str | Callable[..., Any], *, answer: str = "answer", abstain: float = 0.0, **options: Any
) -> Callable[..., dict[str, Any]]:
    """A reward as OpenRLHF's `reward_func(queries, prompts, labels)`; labels become the column `answer`.

    OpenRLHF filters groups by `scores`, the rewards clipped to 0..1. `abstain` is as in `as_verl`.
    """
    loaded = load_reward(reward, options)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: Any
    ) -> dict[str, Any]:
        import torch

        texts = [_after(prompt, query) for query, prompt in zip(queries, prompts, strict=True)]
        found = _scores(loaded, prompts, completions=texts, ids=None, columns={answer: list(labels)})
        rewards = torch.tensor([abstain if score is None else score for score in found])
        abstained = torch.tensor([float(score is None) for score in found])
        return {"rewards": rewards, "scores": rewards.clamp(0, 1), "extra_logs": {"abstained": abstained}}

    return reward_func


def as_areal(
    reward: str | Callable[..., Any], *, abstain: float = 0.0, **options: Any
) -> Callable[..., float]:
    """A reward as AReaL's `reward_fn`, for one sample; where the reward abstains, the score is `abstain`."""
    loaded = load_reward(reward, options)

    def reward_fn(
        prompt: Any, completions: Any, prompt_ids: Any, completion_ids: Sequence[int], **row: Any
    ) -> float:
        found = _grade_one(loaded, prompt, completion=completions, ids=completion_ids, row=row)
        return abstain if found.score is None else found.score

    return reward_fn


class from_verl:
    """verl's `compute_score` as a reward; it returns a number or a dict with "score".

    `ground_truth` is the column `answer`; `data_source` and `extra_info` are optional columns.
    """

    takes_any_column = True

    def __init__(self, function: str, answer: str = "answer", data_source: str = "") -> None:
        self.compute_score, self.answer, self.data_source = find(function), answer, data_source
        self.required_columns = (answer,)

    def __call__(self, completions: Sequence[Any], **columns: Sequence[Any]) -> list[Any]:
        scores = []
        for i, completion in enumerate(completions):
            row = {name: values[i] for name, values in columns.items()}
            found = self.compute_score(
                data_source=row.get("data_source", self.data_source),
                solution_str=completion_text(completion),
                ground_truth=row[self.answer],
                extra_info=row.get("extra_info", {}),
            )
            scores.append(found["score"] if isinstance(found, Mapping) else found)
        return scores


class from_openrlhf:
    """OpenRLHF's `reward_func` as a reward; it returns a tensor or a dict with "rewards"."""

    groupwise = True  # OpenRLHF gives it a batch, so it may compare completions

    def __init__(self, function: str, answer: str = "answer") -> None:
        self.reward_func, self.answer, self.required_columns = find(function), answer, (answer,)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> Any:
        plain = [prompt if isinstance(prompt, str) else completion_text(prompt) for prompt in prompts]
        queries = [prompt + completion_text(c) for prompt, c in zip(plain, completions, strict=True)]
        found = self.reward_func(queries, plain, columns[self.answer])
        return found["rewards"] if isinstance(found, Mapping) else found


class from_areal:
    """AReaL's `reward_fn(prompt, completions, prompt_ids, completion_ids, **row)` -> number, for each sample.

    `prompt_ids` is always empty, because graders get no prompt ids.
    """

    takes_any_column = True

    def __init__(self, function: str) -> None:
        self.reward_fn = find(function)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, **columns: Any
    ) -> list[Any]:
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
        samples = zip(prompts, map(completion_text, completions), completion_ids, rows, strict=True)
        return [self.reward_fn(prompt, said, [], ids, **row) for prompt, said, ids, row in samples]


def _after(prompt: str, query: str) -> str:
    """The completion of a query. A token that begins a text may stand before the prompt.

    Raises:
        ValueError: the query does not hold the prompt, so that the prompt would be graded as an answer.
    """
    _, found, completion = query.partition(prompt) if prompt else ("", "", query)
    if prompt and not found:
        raise ValueError(f"as_openrlhf: the query {query!r:.60} does not hold its prompt {prompt!r:.60}")
    return completion


def _grade_one(
    loaded: RewardFunction, prompt: Any, *, completion: Any, ids: Sequence[int], row: Mapping[str, Any]
) -> Reward:
    _check(loaded, row)
    columns = {name: [value] for name, value in row.items()}
    return grade(loaded, [prompt], completions=[completion], completion_ids=[ids], columns=columns)[0]


def _scores(
    loaded: RewardFunction,
    prompts: Sequence[Any],
    *,
    completions: Sequence[Any],
    ids: Any,
    columns: Mapping[str, Any],
) -> list[float | None]:
    """The scores of a batch; a group-wise reward gets one call per run of equal prompts."""
    extras = {name: columns[name] for name in EXTRAS if name in columns}
    columns = loaded.pick(columns)
    _check(loaded, columns)
    runs = [list(range(len(prompts)))]
    if loaded.groupwise:
        runs = [list(run) for _, run in itertools.groupby(range(len(prompts)), key=lambda i: prompts[i])]
    scores: list[float | None] = []
    for run in runs:
        cut = {name: [values[i] for i in run] for name, values in columns.items()}
        asked, said = [prompts[i] for i in run], [completions[i] for i in run]
        cut_ids = None if ids is None else [ids[i] for i in run]
        given = {"completions": said, "completion_ids": cut_ids, "columns": cut, "extras": extras}
        scores += [reward.score for reward in grade(loaded, asked, **given)]
    return scores


def _check(loaded: RewardFunction, columns: Mapping[str, Any]) -> None:
    for column in loaded.required:
        if column not in columns:
            have = ", ".join(columns) or "none"
            raise ValueError(f"reward {loaded.name!r} needs the column {column!r}; there are: {have}")
