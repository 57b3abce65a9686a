"""A config as YAML that says what every key means, its default and its range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rl.config.sections import Section

BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "no fewer than"}


def described(config: Section, values: Mapping[str, Any] | None = None) -> str:
    """The resolved config with a comment for every key. Keys of sections that are off, or inside lists, are
    listed in comments.

    Args:
        values: shown instead of the config's own values, such as a copy without secrets.
    """
    shown = config.model_dump(mode="json") if values is None else values
    return "\n".join(_lines(type(config), shown)) + "\n"


def _lines(schema: type[BaseModel], values: Mapping[str, Any]) -> Iterator[str]:
    defaults = defaults_of(schema)
    for name, field in schema.model_fields.items():
        value, section = values[name], section_in(field.annotation)
        if section is not None and isinstance(value, Mapping):
            first_paragraph = " ".join((section.__doc__ or "").partition("\n\n")[0].split())
            yield from _with_comment([f"{name}:"], field.description or first_paragraph)
            yield from (f"  {line}" for line in _lines(section, value))
            continue
        plain = yaml.safe_dump({name: value}, sort_keys=False, width=1000, allow_unicode=True).splitlines()
        yield from _with_comment(plain, meaning(field, value, defaults[name]))
        if section is not None:
            kind = "each of them has" if isinstance(value, list) else "null, or a section with"
            yield f"  # {kind}:"
            yield from (f"  #   {line}" for line in _lines(section, defaults_of(section)))


def _with_comment(lines: list[str], comment: str) -> list[str]:
    """Puts the comment after a key of one line, else above the key."""
    if not comment:
        return lines
    return [f"{lines[0]}  # {comment}"] if len(lines) == 1 else [f"# {comment}", *lines]


def meaning(field: FieldInfo, value: Any, default: Any) -> str:
    """Description, choices, range, and the default if the value differs from it."""
    said = [field.description or ""]
    if choices := _choices(field.annotation):
        said.append(f"one of {', '.join(choices)}")
    for rule in [*field.metadata, *_rules(field.annotation)]:
        said += [f"{word} {getattr(rule, key)}" for key, word in BOUNDS.items() if hasattr(rule, key)]
    if field.is_required():
        said.append("required")
    elif default != value:
        said.append(f"default {yaml.safe_dump(default, default_flow_style=True, width=1000).splitlines()[0]}")
    return "; ".join(filter(None, said))


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _rules(annotation: Any) -> list[Any]:
    """Range of a number that may be a word instead: `Annotated[int, Field(ge=1)] | Literal["auto"]`."""
    infos = [m for part in get_args(annotation) for m in getattr(part, "__metadata__", ())]
    return [rule for info in infos for rule in getattr(info, "metadata", ())]


def defaults_of(section: type[BaseModel]) -> dict[str, Any]:
    return dict.fromkeys(section.model_fields) | section.model_construct().model_dump(mode="json")


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type names, even in a list or beside null."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part)) is not None), None)
