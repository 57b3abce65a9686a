"""Finds a reward function by its name and reads from its signature which columns it needs.

A name is one of `BUILT_IN`, an entry point of group `cohort.rewards`, `module:callable`, or
`package.module.callable`. It stands for a reward function (which takes `prompts`, `completions` or
`completion_ids`) or for a factory (a class, or a function that takes none of them). A factory is called with
the options and returns the reward function.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rewards.imports import import_fault, import_module

BUILT_IN: dict[str, str] = {
    "math": "rewards.math:math_reward",
    "math_verify": "rewards.verify:MathVerify",
    "none": "rewards.control:no_reward",
    "random_control": "rewards.control:random_control",
    "format_control": "rewards.control:FormatControl",
    "code": "rewards.code:code_reward",
    "think_format": "rewards.format:think_format",
    "think_answer_format": "rewards.format:think_answer_format",
    "tag_count": "rewards.format:tag_count",
    "boxed_format": "rewards.format:boxed_format",
    "code_format": "rewards.format:code_format",
    "language_consistency": "rewards.language:LanguageConsistency",
    "cosine_length": "rewards.shaping:CosineLength",
    "kimi_length": "rewards.shaping:KimiLength",
    "soft_overlong": "rewards.shaping:SoftOverlong",
    "repetition": "rewards.shaping:Repetition",
    "box_iou": "rewards.grounding:box_iou",
    "mask_iou": "rewards.grounding:mask_iou",
    "reasoning_gym": "rewards.gym:ReasoningGym",
    "environment": "rewards.episode:environment_reward",
    "verl": "rewards.adapters:from_verl",
    "openrlhf": "rewards.adapters:from_openrlhf",
    "areal": "rewards.adapters:from_areal",
}
ENTRY_POINT_GROUP = "cohort.rewards"
MARKERS = ("prompts", "completions", "completion_ids")
TRLS = frozenset({*MARKERS, "trainer_state", "log_extra", "log_metric"})
GIVEN = TRLS | {"completion_facts"}


def _in_graders_only(**_: Any) -> Any:
    raise AssertionError("rewards are called in grader processes only; this process has just a description")


@dataclass(frozen=True)
class RewardFunction:
    """A reward function and what its signature asks for.

    Attributes:
        required: columns that it cannot be called without.
        optional: columns that have a default in its signature; they are passed if the dataset has them.
        takes_any: it has `**columns`, so every column is passed.
        given: which of TRL's own arguments are passed.
        needs_ids: it requires token ids.
        groupwise: one call covers all completions of a prompt; otherwise a single completion.
        time_limit_s: seconds per completion of a deadline that it enforces itself, before the pool's
            deadline. Missing it is a fault of the completion, not of the grader. 0: it has no such deadline.
    """

    name: str
    required: Sequence[str]
    optional: Sequence[str]
    takes_any: bool
    is_async: bool
    groupwise: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    given: Collection[str] = GIVEN
    needs_ids: bool = False
    time_limit_s: float = 0.0
    ignores_answer: bool = False
    fn: Callable[..., Any] = _in_graders_only

    def takes(self, column: str) -> bool:
        named = self.takes_any or column in self.required or column in self.optional
        return named and column not in self.options and column not in GIVEN

    def pick(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that it takes."""
        return {name: value for name, value in columns.items() if self.takes(name)}

    def described(self) -> dict[str, Any]:
        """Its fields as JSON values for another process: no function, and only the names of its options."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fn"}
        return plain | {"given": sorted(self.given), "options": dict.fromkeys(self.options)}


def groupwise(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a reward function that compares the completions of a prompt: one call gets a whole group."""
    fn.groupwise = True  # pyright: ignore[reportFunctionMemberAccess]
    return fn


def per_completion(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a reward function, or a factory of one, that is called for each completion by itself."""
    fn.groupwise = False  # pyright: ignore[reportFunctionMemberAccess]
    return fn


def ignores_answer(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Tells the doctor that a reward does not look at the right answer, such as a reward for length."""
    fn.ignores_answer = True  # pyright: ignore[reportFunctionMemberAccess]
    return fn


def import_path(fn: Callable[..., Any]) -> str:
    """`module:qualname` of a callable.

    Raises:
        ValueError: no other process can import it: a lambda, a nested or a script's function.
    """
    module, qualname = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if module and qualname and module != "__main__" and "<" not in qualname:
        return f"{module}:{qualname}"
    raise ValueError(
        f"reward {qualname or fn!r} of module {module!r} cannot be imported by a grader process: lambdas, "
        "nested functions, configured objects and functions of a script or notebook have no import path; put "
        "the function into a module, such as my_rewards.py in the working directory, and name it "
        "'my_rewards:function' (a factory takes its arguments as options)"
    )


def load_reward(
    reward: str | Callable[..., Any], options: Mapping[str, Any] | None = None, *, name: str = ""
) -> RewardFunction:
    """Loads a reward by its name, or takes a function (called `name`), and binds its options.

    The reserved options `groupwise`, `per_completion` and `ignores_answer: true` mark it without a decorator.

    Raises:
        ValueError: the name is unknown, the import fails, or an option is unknown or missing.
    """
    options = dict(options or {})
    marked, ignores = _mark(options), options.pop("ignores_answer", False)
    if isinstance(reward, str):
        name, fn = reward, find(reward)
    else:
        name, fn = name or getattr(reward, "__name__", type(reward).__name__), reward
    if not callable(fn):
        raise ValueError(f"reward {name!r} is {type(fn).__name__}, not a function; name a callable")
    usual, ignores = name not in BUILT_IN, ignores or getattr(fn, "ignores_answer", False)
    if _is_factory(fn):
        usual = getattr(fn, "groupwise", usual)
        _check_options(name, inspect.signature(fn), options, allowed=None)
        fn, options = fn(**options), {}
        if not callable(fn) or _is_factory(fn):
            raise ValueError(
                f"reward {name!r} takes none of {', '.join(MARKERS)}, so it was called as a factory "
                f"and returned {type(fn).__name__}, not a reward function (prompts, completions, **columns)"
            )
    whole = bool(getattr(fn, "groupwise", usual)) if marked is None else marked
    return replace(_describe(name, fn, options, whole), ignores_answer=bool(ignores))


def _mark(options: dict[str, Any]) -> bool | None:
    """Removes the reserved options; True for calls of a whole group, False for single completions, else None.

    Raises:
        ValueError: they contradict each other.
    """
    said = {name: bool(options.pop(name)) for name in ("groupwise", "per_completion") if name in options}
    wishes = {value == (name == "groupwise") for name, value in said.items()}
    if len(wishes) > 1:
        raise ValueError(f"options {said} contradict each other; give one of them")
    return wishes.pop() if wishes else None


def _describe(name: str, fn: Callable[..., Any], options: dict[str, Any], whole: bool) -> RewardFunction:
    signature = inspect.signature(fn)
    parameters = signature.parameters.values()
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY:
            raise ValueError(
                f"reward {name!r} has the positional-only parameter {p.name!r}; rewards are called by keyword"
            )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    ours = name in BUILT_IN  # their options are keyword-only, so no column is mistaken for one
    columns = [p for p in named if p.kind is p.POSITIONAL_OR_KEYWORD or not ours]
    _check_options(name, signature, options, allowed=[p.name for p in named if p.name not in GIVEN])
    for p in columns:
        if ours and p.name in options:
            raise ValueError(
                f"reward {name!r} reads {p.name!r} from the column of that name, which is not an option "
                f"({options[p.name]!r:.60}); leave it out, and where the dataset's column has another name, "
                f"set data.rename={{column: {p.name}}}"
            )
    columns = [p for p in columns if p.name not in GIVEN and p.name not in options]
    has_rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = [p.name for p in columns if p.default is p.empty] + list(getattr(fn, "required_columns", ()))
    return RewardFunction(
        name=name,
        fn=fn,
        required=tuple(dict.fromkeys(required)),
        optional=tuple(p.name for p in columns if p.default is not p.empty),
        takes_any=bool(getattr(fn, "takes_any_column", has_rest and not ours)),
        is_async=inspect.iscoroutinefunction(fn)
        or inspect.iscoroutinefunction(getattr(fn, "__call__", None)),  # noqa: B004
        groupwise=whole,
        options=options,
        given=(GIVEN & {p.name for p in named}) | (TRLS if has_rest and not ours else set()),
        needs_ids=any(p.name == "completion_ids" and p.default is p.empty for p in named),
        time_limit_s=_time_limit_s(fn, options),
    )


def _time_limit_s(fn: Any, options: Mapping[str, Any]) -> float:
    limit_s = getattr(fn, "time_limit_s", 0.0)
    return float(limit_s) if isinstance(limit_s, int | float) else float(limit_s(options))


def _is_factory(fn: Callable[..., Any]) -> bool:
    if inspect.isclass(fn):
        return True
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return False
    return not any(p.name in MARKERS for p in parameters)


def _check_options(
    name: str, signature: inspect.Signature, options: Mapping[str, Any], allowed: list[str] | None
) -> None:
    known = list(signature.parameters) if allowed is None else allowed
    for option in options:
        if option in known:
            continue
        near = difflib.get_close_matches(option, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'none'}"
        raise ValueError(f"reward {name!r} has no option {option!r}; {hint}")
    needed = [p for p in signature.parameters.values() if allowed is None and p.default is p.empty]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if missing := [p.name for p in needed if p.kind in kinds and p.name not in options]:
        raise ValueError(
            f"reward {name!r} needs the option {missing[0]!r}; give it as options: {{{missing[0]}: ...}} "
            "(a function that itself grades takes `completions`, a list)"
        )


def find(name: str) -> Any:
    """The object that a reward's name stands for.

    Raises:
        ValueError: there is no such object.
    """
    if name in BUILT_IN:
        return _import(name, *BUILT_IN[name].split(":"))
    if ":" in name:
        return _import(name, *name.split(":", 1))
    if (found := _entry_points().get(name)) is not None:
        try:
            return found.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"reward {name!r} (entry point {found.value}) cannot be loaded: {error}"
            ) from error
    if "." in name:
        return _import(name, *name.rsplit(".", 1))
    near = difflib.get_close_matches(name, known := reward_names(), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"built in are: {', '.join(known)}"
    raise ValueError(f"no reward {name!r}; {hint} (a function of your own is named module:function)")


def reward_names() -> list[str]:
    """The names of rewards that are not paths of functions: built-in, and of installed packages."""
    return [*BUILT_IN, *_entry_points()]


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points  # 40 ms, and only names from outside need it

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _import(name: str, module_name: str, attributes: str) -> Any:
    try:
        found: Any = import_module(module_name)
    except Exception as error:
        raise ValueError(f"reward {name!r}: {import_fault(module_name, error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            near = difflib.get_close_matches(attribute, [n for n in dir(found) if not n.startswith("_")], n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"reward {name!r}: {module_name} has no {attribute!r}{hint}")
        found = getattr(found, attribute)
    return found
