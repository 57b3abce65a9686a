"""`cohort config`: checks a config of any kind and prints every key with its meaning, without torch."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from rewards.plugins import reward_names
from rewards.score import take_flags_anywhere
from rl.config import Config, Section
from rl.config.describe import defaults_of, described, meaning, section_in
from rl.config.read import COMMANDS, KINDS, command_of, read_any_config
from rl.report.safe_stream import say
from rl.store.redact import redact

UNSET = object()
WORDS = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Path: "path",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a YAML file; default: all defaults")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=20")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="explain a key or section, such as loss.name: meaning, range, choices; default: every key",
    )
    parser.add_argument("--schema", action="store_true", help="print this kind's JSON schema, for an editor")
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    path, key = arguments.config, arguments.explain
    if key and Path(key).suffix in (".yaml", ".yml"):  # --explain without a key, before the config
        path, key = key, ""
    config = None if path is None else read_any_config(path, arguments.overrides, rewards=reward_names())
    if arguments.schema:
        print(json.dumps(schema_of(Config if config is None else type(config)), indent=1))
    elif key:
        print(explained(key, config))
    elif config is None and key is None:
        raise ValueError("cohort config takes a config file, --explain [KEY] or --schema; see --help")
    else:
        _print_whole(Config() if config is None else config)
    return 0


def _print_whole(config: Section) -> None:
    tree = config.model_dump(mode="json")
    if (shown := redact(tree)) != tree:
        say("secrets are shown as ***; put them back before you use this as a config", sys.stderr)
    print(f"# of `{command_of(config)}`: every key, and what it means\n{described(config, shown)}", end="")


def schema_of(kind: type[Section]) -> dict[str, Any]:
    """The JSON schema (2020-12) of a kind of config: keys, types, ranges, choices, defaults and meanings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


def explained(key: str, config: Section | None = None) -> str:
    """What a key or section means. A last word alone, such as `lr`, explains each key that ends in it.

    Raises:
        ValueError: no config has this key; the message names similar ones.
    """
    kinds = KINDS if config is None else (type(config),)
    for kind in sorted(kinds, key=lambda kind: key not in dict(_keys(kind))):  # whole keys before last words
        keys = dict(_keys(kind))
        if named := [key] if key in keys else [name for name in keys if name.endswith(f".{key}")]:
            said = "\n\n".join("\n".join(_lines(name, *keys[name], config)) for name in named)
            of = "" if kind is kinds[0] else next(c for c, schemas in COMMANDS.items() if kind in schemas)
            return f"{said}\n(a key of `{of}`)" if of else said
    known = dict.fromkeys(name for kind in kinds for name, _ in _keys(kind))
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(key, known, n=3)
    near = near or [last[word] for word in difflib.get_close_matches(key.rpartition(".")[2], last, n=3)]
    sections = ", ".join(name for name in known if "." not in name)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {sections}"
    raise ValueError(f"--explain {key}: no config has this key; {hint}")


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[type[BaseModel], str]]]:
    """(dotted key, (its section, its name)) of every key, including sections and keys of listed sections."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}", (schema, name)
        if (section := section_in(field.annotation)) is not None:
            yield from _keys(section, f"{prefix}{name}.")


def _lines(key: str, schema: type[BaseModel], name: str, config: Section | None) -> Iterator[str]:
    field = schema.model_fields[name]
    section, default = section_in(field.annotation), defaults_of(schema)[name]
    value = UNSET if config is None else _value_of(config, key)
    yield f"{key} ({_type(field.annotation)})" + ("" if value is UNSET else f" = {json.dumps(value)}")
    if section is None:
        yield f"  {meaning(field, UNSET, default)}"
        if (of := key.rpartition(".")[0]) and (text := _doc(schema)):
            yield f"\n  of the section {of}: {text}"
        return
    if said := "\n\n  ".join(filter(None, [field.description, _doc(section)])):
        yield f"  {said}\n"
    inner = defaults_of(section)
    for part, its in section.model_fields.items():
        deeper = section_in(its.annotation)
        what = "a section" if deeper else meaning(its, UNSET, inner[part])
        yield f"  {part} ({_type(its.annotation)}): {what}"


def _value_of(config: Section, key: str) -> Any:
    """The config's value of a key; `UNSET` inside lists and inside sections that are off."""
    value: Any = redact(config.model_dump(mode="json"))
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return UNSET
        value = value[part]
    return value


def _doc(section: type[BaseModel]) -> str:
    """The section's own docstring, never one inherited from `Section` or pydantic."""
    text = section.__dict__.get("__doc__") or ""
    return "\n\n  ".join(" ".join(part.split()) for part in text.split("\n\n"))


def _type(annotation: Any) -> str:
    """A type in words: "integer or null", "list of text"."""
    origin, inside = get_origin(annotation), [_type(part) for part in get_args(annotation)]
    if origin is Literal:
        return "choice"
    if origin in (list, tuple):
        return f"list of {inside[0]}"
    if origin is dict:
        return "keys and values"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return inside[0]
    return " or ".join(inside) if inside else WORDS.get(annotation, "section")
