"""Rows of a dataset in TRL's formats as token ids, and as examples with the padding of a step.

A prompt is tokenised as generation will see it, with the header of the answer; the answer is tokenised
separately. So no token spans the boundary, and the header does not count as answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from rl.config.diffusion import EosConfig, TextConfig
from rl.diffusion.objectives import Example
from rl.model.messages import Messages, messages_of, read_tools, refuse_lost_calls, rendered

Row = Mapping[str, Any]
PROBE = "COHORTANSWER"  # an answer that no template changes


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt (maybe empty) and of what follows it: an answer with its end-of-text token, or a
    piece of text. Prompts are never masked.
    """

    prompt: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode_rows(
    rows: Sequence[Row],
    config: TextConfig,
    tokenizer: Any,
    *,
    mask_token_id: int | None = None,
    shift: bool = False,
) -> tuple[list[Encoded], int]:
    """All examples of a dataset, in memory at 4 bytes per token, and how many were dropped as too long.

    A row's `tools` are shown to the template, as in the prompts of `cohort train`.

    Args:
        shift: the left neighbour predicts a token (Dream). The first token has none and is never masked:
            without a prompt it becomes the prompt, and an example of one token is left out.

    Raises:
        ValueError: columns are unknown, or the chat template is missing or changes what it was given. Or a
            row, which is named, is too long, contains the mask token, has malformed messages or an empty
            answer.
    """
    kind = row_format(rows, config)
    if kind == "text":
        kept, dropped = _chunks(rows, config, tokenizer, mask_token_id), 0
    else:
        kept, dropped = _examples(rows, config, kind=kind, tokenizer=tokenizer, mask_token_id=mask_token_id)
    if shift:
        kept = [e if len(e.prompt) else Encoded(e.answer[:1], e.answer[1:]) for e in kept if len(e) > 1]
    if not kept:
        raise ValueError(f"no example of {config.source} is left: {dropped} are longer than data.max_length")
    return kept, dropped


def _examples(
    rows: Sequence[Row], config: TextConfig, *, kind: str, tokenizer: Any, mask_token_id: int | None
) -> tuple[list[Encoded], int]:
    kept, dropped = [], 0
    for index, row in enumerate(rows):
        tools = read_tools(row.get("tools"), f"row {index}")
        for prompt, answer in _pairs(row, config, kind, f"row {index}"):
            encoded = _encode(prompt, answer, tools=tools, tokenizer=tokenizer, where=f"row {index}")
            if len(encoded) <= config.max_length:
                ids = np.concatenate([encoded.prompt, encoded.answer])
                _refuse_mask(ids, mask_token_id, f"row {index} of {config.source}")
                kept.append(encoded)
                continue
            if config.too_long == "error":
                raise ValueError(
                    f"row {index} of {config.source}: prompt and answer have {len(encoded.prompt)} + "
                    f"{len(encoded.answer)} tokens, more than data.max_length={config.max_length}; raise it, "
                    "or leave such rows out with data.too_long=drop"
                )
            dropped += 1
    return kept, dropped


def padding_ids(config: EosConfig, tokenizer: Any, *, num_rows: int, mask_token_id: int) -> list[int]:
    """The cycle of ids that pads an answer: the end-of-text token, or the rainbow's tokens.

    Args:
        num_rows: rows of the model's vocabulary, which may be more than the tokenizer's.

    Raises:
        ValueError: a rainbow token is not a row of the vocabulary, or is the mask token.
    """
    if config.policy != "rainbow":
        return [tokenizer.eos_token_id]
    vocabulary = tokenizer.get_vocab()
    unknown = [t for t in config.rainbow_tokens if isinstance(t, str) and t not in vocabulary]
    if unknown:
        special = ", ".join(sorted(tokenizer.get_added_vocab()))
        raise ValueError(
            f"eos.rainbow_tokens: {', '.join(unknown)} not in the vocabulary; special tokens are: {special}"
        )
    ids = [vocabulary[t] if isinstance(t, str) else t for t in config.rainbow_tokens]
    if outside := [i for i in ids if not 0 <= i < num_rows]:
        raise ValueError(
            f"eos.rainbow_tokens: {', '.join(map(str, outside))} is not among the model's {num_rows} "
            f"vocabulary rows; use ids from 0 to {num_rows - 1}, or tokens by name"
        )
    if mask_token_id in ids:
        raise ValueError(
            f"eos.rainbow_tokens has the mask token (id {mask_token_id}), which the model could not tell "
            "from a mask; take it out"
        )
    return ids


def padded_examples(batch: Sequence[Encoded], config: EosConfig, padding: Sequence[int]) -> list[Example]:
    """The examples of one optimizer step, over all processes, with the padding that `config` asks for."""
    longest = max(len(encoded) for encoded in batch)
    return [_padded(encoded, config, padding, longest) for encoded in batch]


def padded_length(length: int, config: EosConfig, longest: int) -> int:
    """Tokens of an example of `length` after padding, in a step whose longest example has `longest`."""
    padded = {"single": length, "multiple": -(-length // config.multiple) * config.multiple}
    return padded.get(config.policy, longest)


def _padded(encoded: Encoded, config: EosConfig, padding: Sequence[int], longest: int) -> Example:
    target = padded_length(len(encoded), config, longest)
    tail = list(islice(cycle(padding), target - len(encoded)))
    ids = torch.from_numpy(np.concatenate([encoded.prompt, encoded.answer, np.array(tail, np.int32)])).long()
    return Example(ids, torch.arange(target) >= len(encoded.prompt))


def row_format(rows: Sequence[Row], config: TextConfig) -> str:
    """prompt_completion, messages or text, by the config or the first row; ValueError if neither tells."""
    if not rows:
        raise ValueError(f"{config.source} has no rows; check data.source, data.split and data.size")
    needed = {
        "prompt_completion": (config.prompt_column, config.completion_column),
        "messages": ("messages",),
        "text": ("text",),
    }
    kinds = list(needed) if config.format == "auto" else [config.format]
    for kind in kinds:
        if all(column in rows[0] for column in needed[kind]):
            return kind
    wanted = " or ".join(" and ".join(map(repr, needed[kind])) for kind in kinds)
    raise ValueError(
        f"{config.source} has the columns {', '.join(map(repr, rows[0]))}, but {wanted} are needed; name "
        "yours with data.prompt_column and data.completion_column"
    )


def _pairs(
    row: Row, config: TextConfig, kind: str, where: str
) -> list[tuple[Messages | str, Messages | str]]:
    """(prompt, answer) pairs of a row: every assistant message with the messages before it.

    If later messages were visible, a masked answer could be guessed from the future.
    """
    named = f"{where} of {config.source}"
    if kind == "prompt_completion":
        prompt: Any = row.get(config.prompt_column)
        answer: Any = row.get(config.completion_column)
        if answer in (None, "", []):
            raise ValueError(f"{where}: the answer is empty; leave the row out")
        if {type(prompt), type(answer)} not in ({str}, {list}):
            raise ValueError(
                f"{named}: {config.prompt_column!r} is {type(prompt).__name__} and "
                f"{config.completion_column!r} is {type(answer).__name__}; make both text, or both lists of "
                "messages"
            )
        if not isinstance(prompt, str):
            if config.template != "{prompt}":
                raise ValueError(
                    f"{named}: data.template wraps text, but this prompt is a chat; leave it out"
                )
            turns = messages_of(answer, f"{named}: {config.completion_column!r}")
            if {turns[0]["role"], turns[-1]["role"]} != {"assistant"}:
                raise ValueError(
                    f"{named}: {config.completion_column!r} must begin and end with a message of the role "
                    f"'assistant', not {turns[0]['role']!r} and {turns[-1]['role']!r}"
                )
            return [(_with_system(messages_of(prompt, f"{named}: {config.prompt_column!r}"), config), turns)]
        prompt = config.template.replace("{prompt}", prompt)
        if not config.chat:
            return [(prompt, answer)]
        asked = [{"role": "user", "content": prompt}]
        return [(_with_system(asked, config), [{"role": "assistant", "content": answer}])]
    messages = messages_of(row.get("messages") or [], f"{named}: 'messages'")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{named}: no message has the role 'assistant', so there is nothing to learn")
    return [(_with_system(messages[:i], config), [messages[i]]) for i in turns]


def _with_system(messages: Messages, config: TextConfig) -> Messages:
    if config.system_prompt is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": config.system_prompt}, *messages]


def _encode(
    prompt: Messages | str, answer: Messages | str, *, tools: Sequence[Any] | None, tokenizer: Any, where: str
) -> Encoded:
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_text = answer
    else:
        assert not isinstance(answer, str)
        prompt_text, answer_text = _rendered(prompt, answer, tools=tools, tokenizer=tokenizer, where=where)
        prompt_ids = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer_text, add_special_tokens=False)["input_ids"]
    if not answer_text.strip() or not answer_ids:
        raise ValueError(f"{where}: the answer is empty; leave the row out")
    if answer_ids[-1:] != [tokenizer.eos_token_id]:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return Encoded(np.array(prompt_ids, np.int32), np.array(answer_ids, np.int32))


def _rendered(
    prompt: Messages, answer: Messages, *, tools: Sequence[Any] | None, tokenizer: Any, where: str
) -> tuple[str, str]:
    """The prompt with the header of its answer, and the answer up to its end-of-turn token.

    What a template writes after that token (a line break; LLaDA-8B-Base: another header) is not an answer.
    A probe in its place finds where an answer ends, since its text may occur in the template's.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, but the rows are chats; set model.chat_template to a Jinja "
            "file, use the instruct model, or data.chat=false for plain text"
        )
    if not prompt:
        raise ValueError(f"{where}: the chat begins with an answer; put a user's message before it")
    head = rendered(prompt, tokenizer, where, tools=tools, answer_follows=True)
    refuse_lost_calls(prompt, head, where)
    last, calls = answer[-1], bool(answer[-1].get("tool_calls"))
    content = last["content"].strip()
    if not content and not calls:
        raise ValueError(f"{where}: the answer is empty; leave the row out")
    whole = rendered([*prompt, *answer], tokenizer, where, tools=tools)
    spoken = {key: value for key, value in last.items() if key != "tool_calls"}
    probe = [*prompt, *answer[:-1], spoken | {"content": PROBE}]
    tail = rendered(probe, tokenizer, where, tools=tools).rpartition(PROBE)[2]
    end = len(whole) - len(tail)
    kept = whole.startswith(head) and whole.endswith(tail) and end > len(head)
    refuse_lost_calls(answer, whole.removeprefix(head), where)
    said = whole[:end].rstrip()
    if not kept or not (content in said[len(head) :] if calls else said.endswith(content)):
        raise ValueError(
            f"{where}: the chat template changes what it is given (the whole chat does not begin with the "
            "prompt, or lacks the answer), so prompt and answer cannot be told apart; set "
            "model.chat_template to one that keeps them"
        )
    specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    found = [(tail.find(token), token) for token in specials if token in tail]
    if found:
        start, token = min(found)
        tail = tail[: start + len(token)]
    return head, whole[len(head) : end] + tail


def _refuse_mask(ids: np.ndarray, mask_token_id: int | None, where: str) -> None:
    if mask_token_id is not None and mask_token_id in ids:
        raise ValueError(
            f"{where} contains the mask token (id {mask_token_id}), which the model could not tell from a "
            "mask; choose a token that your text never uses (model.mask_token)"
        )


def _chunks(
    rows: Sequence[Row], config: TextConfig, tokenizer: Any, mask_token_id: int | None
) -> list[Encoded]:
    """Documents end to end, cut every `max_length` tokens; the last piece may be shorter."""
    pieces = []
    for index, row in enumerate(rows):
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(f"row {index} of {config.source}: 'text' is {type(text).__name__}, not text")
        pieces.append(np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], np.int32))
        _refuse_mask(pieces[-1], mask_token_id, f"row {index} of {config.source}")
    stream = np.concatenate(pieces)
    nothing = np.empty(0, np.int32)
    return [
        Encoded(nothing, stream[start : start + config.max_length])
        for start in range(0, len(stream), config.max_length)
    ]
