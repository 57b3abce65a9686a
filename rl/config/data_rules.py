"""The rules of `data` and `evaluation.data`: a key that would do nothing with this source is refused."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Protocol

from rl.config.sections import DataConfig, HeldoutConfig

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".tsv", ".txt", ".gz", ".zst", ".xlsx")
RESERVED = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)
"""Arguments of `apply_chat_template` that `rollout.chat` gives, or that change what it returns."""


class SourceKeys(Protocol):
    @property
    def source(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def options(self) -> dict[str, Any]: ...


def check_source(keys: SourceKeys, section: str, *, is_local: bool | None = None) -> None:
    """Refuses `split`, `revision` and `options` where the source takes none.

    Args:
        is_local: the source is a file or a saved data set; None: as the suffix of its name says.
    """
    is_made = ":" in keys.source and PurePath(keys.source).suffix not in DATA_SUFFIXES
    if is_local is None:
        is_local = not is_made and PurePath(keys.source).suffix in DATA_SUFFIXES
    named = f"{section}.source={keys.source!r}"
    if is_made and keys.split != "train":
        raise ValueError(
            f"{section}.split={keys.split!r} does nothing, as {named} has no splits; leave it out, and use "
            f"{section}.options or {section}.size"
        )
    if (is_made or is_local) and keys.revision is not None:
        raise ValueError(
            f"{section}.revision={keys.revision!r} does nothing, as {named} is not on the hub; leave it out"
        )
    if is_local and keys.options:
        given = ", ".join(f"{name}: {value}" for name, value in keys.options.items())
        raise ValueError(
            f"{section}.options={{{given}}} does nothing, as {named} takes no options; leave it out, or add "
            f"{section}.options={{}} to the command (columns are renamed by {section}.rename={{old: new}})"
        )


def check_data(data: DataConfig, section: str) -> None:
    """Raises ValueError for keys that do nothing with the source or the form of the prompts."""
    check_source(data, section)
    if "{prompt}" not in data.template:
        raise ValueError(
            f"{section}.template={data.template!r} has no {{prompt}}, so every prompt would be the same "
            "text; write {prompt} where the row's prompt belongs"
        )
    if len(set(data.rename.values())) < len(data.rename):
        raise ValueError(f"{section}.rename={data.rename} gives two columns one name; name each differently")
    if reserved := sorted(RESERVED & data.chat_template_kwargs.keys()):
        raise ValueError(
            f"{section}.chat_template_kwargs has {', '.join(reserved)}, which is not the template's to "
            "choose; give variables of the template, such as enable_thinking"
        )


def check_heldout(held: HeldoutConfig | None) -> None:
    """Checks `evaluation.data`: a source of its own, or a share of the training rows and nothing else."""
    if held is None:
        return
    if held.share is None:
        check_data(held, "evaluation.data")
        return
    fields = DataConfig.model_fields
    changed = [name for name, field in fields.items() if getattr(held, name) != field.default]
    if changed:
        raise ValueError(
            f"evaluation.data.share={held.share:g} holds out rows of data.source, which are read and "
            f"rendered by the keys of data; leave out evaluation.data.{changed[0]}, or the share"
        )
