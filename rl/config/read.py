"""Configs from YAML files and `key.sub=value` overrides, with every fault named and the nearest known key
suggested.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from rl.config import Config, Section
from rl.config.bounded_yaml import parse_yaml, read_yaml
from rl.config.describe import section_in
from rl.config.diffusion import DiffusionConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.sft import SftConfig
from rl.config.traces import PipelineConfig, TracesConfig

C = TypeVar("C", bound=Section)
Names = Collection[str]
COMMANDS: dict[str, tuple[type[Section], ...]] = {
    "cohort train": (Config, MaskedRunConfig),
    "python -m recipes.llada": (DiffusionConfig,),
    "python -m recipes.sft": (SftConfig,),
    "cohort sample": (TracesConfig,),
    "python -m recipes.pipeline": (PipelineConfig,),
}
"""Command -> schemas of its configs."""
KINDS = tuple(schema for schemas in COMMANDS.values() for schema in schemas)


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, rewards: Names = ()) -> Config:
    """The config of an RL run: `MaskedRunConfig` where there is a section `diffusion`."""
    return validated_run(_read_tree(path, overrides), path, rewards=rewards)


def validated_run(tree: dict[str, Any], path: str | Path | None = None, *, rewards: Names = ()) -> Config:
    """`load_config` of what a YAML file holds; `path` is for messages."""
    return validated(MaskedRunConfig if "diffusion" in tree else Config, tree, path, rewards=rewards)


def run_tree(config: str | Path | Mapping[str, Any] | Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a YAML file of the config would hold, overridden by `given`: keys such as "optimizer.lr", and
    sections as mappings of their keys.
    """
    if isinstance(config, Config):
        tree = config.model_dump(mode="json", exclude_unset=True)
        tree |= {} if type(config) is Config else {"diffusion": tree.get("diffusion", {})}
    elif isinstance(config, Mapping):
        tree = copy.deepcopy(dict(config))
    else:
        tree = _read_tree(config, ())
    for key, value in given.items():
        is_section = isinstance(value, Mapping) and key in MaskedRunConfig.model_fields
        parts = {f"{key}.{name}": part for name, part in value.items()} if is_section else {key: value}
        for name, part in parts.items():
            _put(tree, name, part)
    return tree


def read_any_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, rewards: Names = ()
) -> Section:
    """The config by the schema that it fits best; where two fit equally, that of an RL run."""
    tree = _read_tree(path, overrides)
    other = Config if "diffusion" in tree else MaskedRunConfig
    kinds = (kind for kind in KINDS if kind is not other)
    return validated(min(kinds, key=lambda kind: _num_faults(kind, tree)), tree, path, rewards=rewards)


def command_of(config: Section) -> str:
    """The command that takes this config."""
    return next(command for command, schemas in COMMANDS.items() if type(config) in schemas)


def read_config(
    schema: type[C], path: str | Path | None, overrides: Sequence[str] = (), *, rewards: Names = ()
) -> C:
    """Reads a YAML file, applies `a.b=value` overrides and validates by `schema`.

    Args:
        rewards: names that a reward may have, besides paths to functions. Without them any name may
            stand, as in the folder of a run whose program handed rewards over.

    Raises:
        ValueError: the file is not a mapping, an override has no '=', or a key, type, range or rule is wrong;
            every fault is listed.
    """
    return validated(schema, _read_tree(path, overrides), path, rewards=rewards)


def _read_tree(path: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    if path is not None:
        path = Path(path).expanduser()
        if not path.exists():
            near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.yaml")], n=1)
            raise ValueError(f"no config file {path}" + (f"; did you mean {near[0]}?" if near else ""))
        tree = read_yaml(path) or {}
        if not isinstance(tree, dict):
            raise ValueError(f"{path} must hold keys and values (a YAML mapping), not {type(tree).__name__}")
    for override in overrides:
        key, eq, text = override.partition("=")
        if not eq:
            raise ValueError(f"override {override!r} must look like key.sub=value, such as train.steps=20")
        try:
            _put(tree, key.lstrip("-"), _read_scalar(text))
        except ValueError as error:
            raise ValueError(
                f"override {override!r}: the value is not valid YAML ({error}); put text with "
                f"special characters in quotes within quotes: '{key}=\"...\"'"
            ) from None
    return tree


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = value


def validated(schema: type[C], tree: dict[str, Any], path: str | Path | None, *, rewards: Names = ()) -> C:
    try:
        return schema.model_validate(tree, context={"rewards": rewards})
    except ValidationError as error:
        lines = _explain(error, path, schema) + _other_command(schema, tree, _num_faults(schema, tree))
        raise ValueError("\n  ".join(lines)) from None


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}, as overrides name keys; an empty section is a value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_section = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat


def differing(before: Section, now: Section) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value before, value now) where two configs differ; a missing key is None."""
    old, new = (flatten(config.model_dump(mode="json")) for config in (before, now))
    keys = sorted(old.keys() | new.keys())
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def replaced(config: C, values: Mapping[str, Any]) -> C:
    """The config with other values at some dotted keys, validated again."""
    tree = config.model_dump()
    for key, value in values.items():
        _put(tree, key, value)
    return type(config).model_validate(tree)


def dump_config(config: Section) -> str:
    """The resolved config as YAML; `read_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_scalar(text: str) -> Any:
    """YAML, with 1e-5 read as a float (YAML 1.1 reads it as a string)."""
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text):
        return float(text)
    return parse_yaml(text)


def _fields_at(schema: type[Section], location: Sequence[int | str]) -> list[str]:
    """Names of the keys of the section at `location`."""
    section: type[BaseModel] | None = schema
    for part in location:
        if isinstance(part, str):
            field = section.model_fields.get(part)
            section = None if field is None else section_in(field.annotation)
        if section is None:
            return []
    return list(section.model_fields)


def _other_command(schema: type[Section], tree: dict[str, Any], num_faults: int) -> list[str]:
    """A hint if another command finds fewer faults in this config and knows as many of its sections."""
    known = len(schema.model_fields.keys() & tree)
    others = [(c, other) for c, schemas in COMMANDS.items() if schema not in schemas for other in schemas]
    able = [(c, other) for c, other in others if len(other.model_fields.keys() & tree) >= known]
    fewest, command = min(((_num_faults(other, tree), c) for c, other in able), default=(num_faults, ""))
    hint = f"this looks like a config of `{command}`, which is another command"
    return [hint] if fewest < num_faults else []


def _num_faults(schema: type[Section], tree: dict[str, Any]) -> int:
    try:
        schema.model_validate(tree)
    except ValidationError as error:
        return len(error.errors())
    return 0


def _explain(error: ValidationError, path: str | Path | None, schema: type[Section]) -> list[str]:
    lines = []
    for fault in error.errors():
        location = list(fault["loc"])
        key = ".".join(str(part) for part in location)
        if fault["type"] == "extra_forbidden":
            known = _fields_at(schema, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=2, cutoff=0.5)
            where = f"section {'.'.join(map(str, location[:-1]))}" if location[:-1] else "a config"
            hint = f"did you mean {' or '.join(near)}?" if near else f"{where} has: {', '.join(known)}"
            lines.append(f"{key}: unknown key; {hint}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: must be given")
        elif fault["type"] == "model_type" and isinstance(given := fault["input"], str) and key:
            lines.append(f"{key}={given!r}: takes keys and values, such as {{name: {given}}}")
        elif key:
            lines.append(f"{key}={cast(Any, fault['input'])!r}: {fault['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(fault["msg"].removeprefix("Value error, "))
    head = f"{len(lines)} fault{'s' if len(lines) > 1 else ''} in {path or 'the config'}:"
    return [head, *lines]
