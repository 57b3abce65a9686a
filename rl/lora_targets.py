"""Which modules the names of a config adapt."""

from __future__ import annotations

import difflib
import re

from transformers import PreTrainedModel


def check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    """Raises ValueError, with near names, if a target of an adapter fits no module: peft would leave it out.

    A name in a list fits modules that end with it, a text is "all-linear" or a pattern of whole names.
    """
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise ValueError(f"model.lora.target_modules={targets!r} is no pattern: {error}") from None
    else:
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if targets and not missing:
        return
    head = model.get_output_embeddings()
    known = list(
        dict.fromkeys(
            name.split(".")[-1]
            for name, part in model.named_modules()
            if part is not head and getattr(getattr(part, "weight", None), "ndim", 0) == 2
        )
    )
    near = [n for t in missing for n in difflib.get_close_matches(t.split(".")[-1], known, n=2)]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ";"
    if isinstance(targets, str):
        hint = "; a text fits whole names, a list such as [q_proj, v_proj] their ends:"
    called = " or ".join(missing) or "nothing"
    raise ValueError(
        f"model.lora.target_modules={targets!r}: no module is called {called}{hint} there are "
        f"{', '.join(known)}, and all-linear takes every linear layer but the head"
    )
