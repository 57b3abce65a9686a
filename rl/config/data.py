"""Where prompts come from, held-out ones too. A key that would do nothing with its source is refused."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rl.config.sections import HOME, SamplingConfig, Section

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".tsv", ".txt", ".gz", ".zst", ".xlsx")
RESERVED = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask"),
        *("return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)
"""Arguments of `apply_chat_template` that `rollout.chat` gives, or that change what it returns."""

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
    "tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>."
    "\nUser: {prompt}\nAssistant:"
)
THINK = "Reason inside <think> and </think>, then"
BOXED = "Reason step by step, and put the final answer into \\boxed{}."
TEMPLATES: dict[str, tuple[str, bool]] = {
    "r1-zero": (R1_ZERO, False),
    "base-boxed": (f"Question: {{prompt}}\n{BOXED}\nAnswer:", False),
    "boxed": (f"{{prompt}}\n\n{BOXED}", True),
    "think-boxed": (f"{{prompt}}\n\n{THINK} put the final answer into \\boxed{{}}.", True),
    "think-answer": (f"{{prompt}}\n\n{THINK} put the final answer into <answer> and </answer>.", True),
    "code": ("{prompt}\n\nAnswer with one block of Python code.", True),
}
"""Name -> (text, whether it goes into a chat). r1-zero: DeepSeek-R1, arXiv:2501.12948, table 1."""


class SourceConfig(Section):
    """Where rows come from."""

    source: Annotated[str, HOME]
    split: str = Field(default="train", description="of the dataset")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub name")
    size: int | None = Field(default=None, ge=1, description="rows generated, or the first rows of a dataset")
    options: dict[str, Any] = Field(default={}, description="arguments of generator, hub loader or callable")


class PromptsConfig(SourceConfig):
    """Where rows come from, and how their prompts are read."""

    prompt_column: str = Field(default="prompt", description="text or messages")
    system_prompt: str | None = Field(default=None, description="put before chats that have none")
    template: str = Field(
        default="{prompt}",
        description=f"wraps a text prompt; {{prompt}} is replaced; or one of {', '.join(TEMPLATES)}",
    )

    @model_validator(mode="before")
    @classmethod
    def fill_template(cls, values: Any) -> Any:
        """Replaces a template's name by its text and its `chat`.

        A run records the text, so that a later version of the named template does not change the run.
        """
        name = values.get("template") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in TEMPLATES:
            return values
        text, chat = TEMPLATES[name]
        if values.get("chat", chat) is not chat:
            kind = "a chat" if chat else "plain text of base models"
            raise ValueError(f"template={name} is for {kind}; leave out chat or use chat={str(chat).lower()}")
        return {**values, "template": text, "chat": chat}


class DataConfig(PromptsConfig):
    """Where prompts come from: `task:NAME`, `reasoning_gym:NAME`, a hub name, a file or folder that
    `datasets` reads, or `module:callable`.
    """

    source: Annotated[str, HOME] = "reasoning_gym:chain_sum"
    rename: dict[str, str] = Field(default={}, description="columns, old: new; all other keys use the new")
    columns: list[str] = Field(default=[], description="kept for graders; empty = all")
    chat: bool = Field(default=True, description="a text prompt becomes a user message; false: it stays text")
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="variables of the chat template, such as {enable_thinking: false}"
    )
    continue_final_message: bool = Field(
        default=False, description="completions continue the last message if it is the assistant's"
    )
    max_prompt_length: int = Field(default=1024, ge=1, description="tokens, templates included; see too_long")
    too_long: Literal["refuse", "drop"] = Field(
        default="refuse", description="rows above max_prompt_length: refuse to start the run, or drop them"
    )
    shuffle: bool = Field(default=True, description="a new order of prompts in each epoch, by train.seed")


class HeldoutConfig(DataConfig):
    """Prompts of an evaluation: from their own source, or a share of the training rows."""

    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of training rows to hold out, by hash of prompt and train.seed; the only key then",
    )


class EvaluationConfig(Section):
    """Measures held-out accuracy before, every `every` steps and after, with its own prompts and sampling. It
    never touches the training stream.
    """

    data: HeldoutConfig | None = Field(default=None, description="default: no evaluation")
    overlap: Literal["warn", "drop", "refuse"] = Field(
        default="warn",
        description="for training prompts that equal a held-out one, or share 13 consecutive words with just "
        "one (words shared with several are the task's): warn, drop them, or refuse to start the run",
    )
    every: int = Field(default=0, ge=0, description="0: only before and after")
    metric: str = Field(default="math", description="the reward whose score, cut to 0..1, counts as accuracy")
    num_samples: int = Field(default=1, ge=1, description="completions per prompt; accuracy is their mean")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)


class OverlapConfig(Section):
    """An evaluation whose prompts are looked for among the rows, by the rule of `evaluation.overlap`."""

    data: DataConfig = Field(
        description="its prompts, such as {source: 'task:gsm8k', split: test}, with the rows' template"
    )
    action: Literal["warn", "drop", "refuse"] = Field(
        default="warn", description="say how many there are, leave them out, or end before the start"
    )


def check_source(keys: SourceConfig, section: str, *, is_local: bool | None = None) -> None:
    """Raises ValueError for `split`, `revision` or `options` if the source takes none.

    Args:
        is_local: whether the source is a file or a saved dataset; None: judged by the suffix of its name.
    """
    is_task = keys.source.startswith("task:")
    is_made = ":" in keys.source and not is_task and PurePath(keys.source).suffix not in DATA_SUFFIXES
    if is_local is None:
        is_local = not is_made and not is_task and PurePath(keys.source).suffix in DATA_SUFFIXES
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
            f"text; write {{prompt}} where the row's prompt goes, or name one of {', '.join(TEMPLATES)}"
        )
    if len(set(data.rename.values())) < len(data.rename):
        raise ValueError(f"{section}.rename={data.rename} gives two columns one name; name each differently")
    if reserved := sorted(RESERVED & data.chat_template_kwargs.keys()):
        raise ValueError(
            f"{section}.chat_template_kwargs has {', '.join(reserved)}, which is not a variable of the "
            "template; give variables of the template, such as enable_thinking"
        )


def check_heldout(held: HeldoutConfig | None) -> None:
    """Checks `evaluation.data`: its own source, or a share of the training rows and nothing else."""
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
