"""Rows of a dataset in TRL's formats as token ids, once, and as examples with the padding of a step.

A prompt is tokenised as generation will see it, header of the answer included, and the answer on its own:
no token spans the boundary, and none of the header counts as answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from rl.diffusion.config import EosConfig, TextConfig
from rl.diffusion.objectives import Example

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt (maybe none) and of an answer that ends with the end-of-text token."""

    prompt: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode_rows(rows: Sequence[Row], config: TextConfig, tokenizer: Any) -> tuple[list[Encoded], int]:
    """All examples of a dataset, and how many were dropped as too long. Held in memory, 4 bytes a token.

    Raises:
        ValueError: unknown columns, an empty answer, a chat template that is missing or does not keep what it
            was given, or an example longer than `max_length`, with its row.
    """
    kind = _format(rows, config)
    if kind == "text":
        return _chunks(rows, config, tokenizer), 0
    kept, dropped = [], 0
    for index, row in enumerate(rows):
        for prompt, answer in _pairs(row, config, kind, f"row {index}"):
            encoded = _encode(prompt, answer, tokenizer, f"row {index}")
            if len(encoded) <= config.max_length:
                kept.append(encoded)
                continue
            if config.too_long == "error":
                raise ValueError(
                    f"row {index} of {config.source}: prompt and answer have {len(encoded.prompt)} + "
                    f"{len(encoded.answer)} tokens, more than data.max_length={config.max_length}; raise it, "
                    "or leave such rows out with data.too_long=drop"
                )
            dropped += 1
    if not kept:
        raise ValueError(f"no example of {config.source} is left: {dropped} are longer than data.max_length")
    return kept, dropped


def padding_ids(config: EosConfig, tokenizer: Any) -> list[int]:
    """The cycle of ids that follows an answer's end: the end-of-text token, or the rainbow's."""
    if config.policy != "rainbow":
        return [tokenizer.eos_token_id]
    vocabulary = tokenizer.get_vocab()
    unknown = [t for t in config.rainbow_tokens if isinstance(t, str) and t not in vocabulary]
    if unknown:
        special = ", ".join(sorted(tokenizer.get_added_vocab()))
        raise ValueError(
            f"eos.rainbow_tokens: {', '.join(unknown)} not in the vocabulary; special tokens are: {special}"
        )
    return [vocabulary[t] if isinstance(t, str) else t for t in config.rainbow_tokens]


def padded_examples(batch: Sequence[Encoded], config: EosConfig, padding: Sequence[int]) -> list[Example]:
    """The examples of one optimizer step, all processes', with the padding that their policy asks for."""
    longest = max(len(encoded) for encoded in batch)
    return [_padded(encoded, config, padding, longest) for encoded in batch]


def _padded(encoded: Encoded, config: EosConfig, padding: Sequence[int], longest: int) -> Example:
    target = {
        "single": len(encoded),
        "multiple": -(-len(encoded) // config.multiple) * config.multiple,
    }.get(config.policy, longest)
    tail = list(islice(cycle(padding), target - len(encoded)))
    ids = torch.from_numpy(np.concatenate([encoded.prompt, encoded.answer, np.array(tail, np.int32)])).long()
    return Example(ids, torch.arange(target) >= len(encoded.prompt))


def _format(rows: Sequence[Row], config: TextConfig) -> str:
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
        f"{config.source} has the columns {', '.join(map(repr, rows[0]))}, and {wanted} are needed; name "
        "yours with data.prompt_column and data.completion_column"
    )


def _pairs(
    row: Row, config: TextConfig, kind: str, where: str
) -> list[tuple[Messages | str, Messages | str]]:
    """(prompt, answer) pairs of a row: every assistant message with what came before it, and nothing after.

    An answer that is masked while its successors are visible would be guessed from the future.
    """
    if kind == "prompt_completion":
        prompt: Any = row[config.prompt_column]
        answer: Any = row[config.completion_column]
        if not isinstance(prompt, str):
            return [(_with_system(list(prompt), config), list(answer))]
        if not config.chat:
            return [(prompt, answer)]
        return [(_with_system(_message("user", prompt), config), _message("assistant", answer))]
    messages = row["messages"]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(
            f"{where} of {config.source}: no message has the role 'assistant', so nothing to learn"
        )
    return [(_with_system(list(messages[:i]), config), [messages[i]]) for i in turns]


def _message(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]


def _with_system(messages: Messages, config: TextConfig) -> Messages:
    if config.system_prompt is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [*_message("system", config.system_prompt), *messages]


def _encode(prompt: Messages | str, answer: Messages | str, tokenizer: Any, where: str) -> Encoded:
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        if not answer:
            raise ValueError(f"{where}: the answer is empty; leave the row out")
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_text = answer
    else:
        assert not isinstance(answer, str)
        prompt_text, answer_text = _rendered(prompt, answer, tokenizer, where)
        prompt_ids = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer_text, add_special_tokens=False)["input_ids"]
    if answer_ids[-1:] != [tokenizer.eos_token_id]:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return Encoded(np.array(prompt_ids, np.int32), np.array(answer_ids, np.int32))


def _rendered(prompt: Messages, answer: Messages, tokenizer: Any, where: str) -> tuple[str, str]:
    """The prompt with the header of its answer, and the answer up to its end-of-turn token.

    What a template writes behind that token (a line break, with LLaDA-8B-Base another header) is no answer.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, and the rows are chats; set model.chat_template to a Jinja "
            "file, use the instruct model, or data.chat=false for plain text"
        )
    head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    content = str(answer[-1]["content"]).strip()
    if not content:
        raise ValueError(f"{where}: the answer is empty; leave the row out")
    end = whole.rfind(content) + len(content)
    if not whole.startswith(head) or end <= len(head):
        raise ValueError(
            f"{where}: the chat template changes what it is given (the prompt is no beginning of the whole "
            "chat, or the answer is not in it), so prompt and answer cannot be told apart; set "
            "model.chat_template to one that keeps them"
        )
    tail = whole[end:]
    specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    found = [(tail.find(token), token) for token in specials if token in tail]
    if found:
        start, token = min(found)
        tail = tail[: start + len(token)]
    return head, whole[len(head) : end] + tail


def _chunks(rows: Sequence[Row], config: TextConfig, tokenizer: Any) -> list[Encoded]:
    """Documents end to end, cut every `max_length` tokens; the last piece may be shorter."""
    pieces = []
    for index, row in enumerate(rows):
        if not isinstance(row["text"], str):
            raise ValueError(
                f"row {index} of {config.source}: 'text' is {type(row['text']).__name__}, not text"
            )
        pieces.append(np.array([*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id], np.int32))
    stream = np.concatenate(pieces)
    nothing = np.empty(0, np.int32)
    return [
        Encoded(nothing, stream[start : start + config.max_length])
        for start in range(0, len(stream), config.max_length)
    ]
