"""Checks the shapes and dtypes that our annotations promise, whenever a test calls an annotated function."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

HOUSE = Path(__file__).parents[1]
OF_A_TENSOR = re.compile(r"\b(Float|Int|Bool|Shaped)\[")


def annotated_modules() -> list[str]:
    """Our modules that annotate shapes."""
    files = [f for wing in ("rl", "rollout", "recipes", "rewards") for f in (HOUSE / wing).rglob("*.py")]
    named = [f for f in files if "from jaxtyping import" in f.read_text(encoding="utf-8")]
    return [".".join(f.relative_to(HOUSE).with_suffix("").parts) for f in named]


def check_tensors(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with its tensors checked. Other annotations are left to pyright: protocols cannot be checked."""
    kept = {name: hint for name, hint in fn.__annotations__.items() if OF_A_TENSOR.search(str(hint))}
    if not kept:
        return fn
    fn.__annotations__ = kept
    from beartype import beartype

    return beartype(fn)


def install() -> str:
    """Checks what is imported afterwards; says whether beartype is there to do it."""
    if importlib.util.find_spec("beartype") is None:
        return "shapes are not checked: beartype is not installed"
    install_import_hook(annotated_modules(), "tests.shapes.check_tensors")
    return "shapes are checked by beartype"
