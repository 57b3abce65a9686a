"""Makes the tokens between two turns: sampled tokens stay as they are, and only what follows is rendered.

The template renders the whole chat as text. If that text begins with the text of the row so far, the rest is
tokenised and appended. If not, the template changed what was said: it drops earlier thinking, trims, or
rewrites calls. That is drift, and `history` says how it is handled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from rl.types import Completion, Message, Origin, Prompt
from rollout.calls import special_ids
from rollout.template import Chat, render_chats

History = Literal["append", "template"]
Tokens = list[tuple[int, Origin]]
BEGIN, END = "\ue000", "\ue001"  # around a mark that stands for a string: private-use characters
MARK = re.compile(f"{BEGIN}(\\d+){END}")
TURN = f"{BEGIN}turn{END}"
CHARACTERS_PER_TOKEN = 64  # more than any tokenizer puts into one on average
CUT = " [cut]"


@dataclass(slots=True)
class Talk:
    """A row of an episode as text, marks included, up to where the policy speaks next.

    Attributes:
        messages: of the prompt and all that followed.
        ending: the end of turn that was sampled last, as text; empty if there was none.
    """

    prompt: Prompt
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    ending: str = ""

    def __post_init__(self) -> None:
        self.text = escaped(self.prompt.text, {})
        self.messages = [
            {**m, "content": escaped(m["content"], {})} if isinstance(m.get("content"), str) else m
            for m in self.prompt.messages
        ]

    def say(self, text: str, ending: str = "") -> None:
        """Adds what the policy said, marks included; a prompt that ended in the assistant's own words is
        continued.
        """
        said = text
        self.text += said
        self.ending = ending
        if self.messages and self.messages[-1]["role"] == "assistant":
            last = self.messages.pop()
            said = f"{last['content']}{said}"
        self.messages.append({"role": "assistant", "content": said})


@dataclass(frozen=True, slots=True)
class Step:
    """What follows a turn.

    Attributes:
        tokens: ids and origins; for a new row those of its whole prompt.
        text: of the row with them.
        is_new_row: the prefix changed, and the episode goes on in another row.
        has_drifted: the template would now render the row differently.
    """

    tokens: Tokens
    text: str
    is_new_row: bool = False
    has_drifted: bool = False


def escaped(text: str, numbers: Mapping[str, int]) -> str:
    """The text with a mark for each of these strings, so that no reader takes them for tokens."""
    found = re.sub(f"[{BEGIN}{END}]", "\ufffd", text)
    if not numbers:
        return found
    anyone = "|".join(map(re.escape, sorted(numbers, key=len, reverse=True)))
    return re.sub(anyone, lambda match: f"{BEGIN}{numbers[match[0]]}{END}", found)


class TurnRenderer:
    """Renders what environments say by the model's chat template; special tokens in it become plain text.

    Args:
        variables: of the template, such as enable_thinking.
        tools: JSON schemas that the prompts were rendered with.
        history: "append": what was said stays as it was, whatever the template would make of it.
            "template": the model sees what the template makes of the chat, in a new row where that differs.
        max_answer_length: tokens of one message; what is beyond is cut off, with a mark.
        template_file: where the template was read from, for errors.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Any] = (),
        history: History = "append",
        max_answer_length: int = 1024,
        template_file: str | None = None,
    ) -> None:
        self.tokenizer, self.variables, self.tools = tokenizer, dict(variables or {}), list(tools)
        self.history, self.max_answer_length = history, max_answer_length
        self.template_file = template_file
        self.strings = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})
        self.numbers = {string: number for number, string in enumerate(self.strings)}
        self.added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        self.added.discard(tokenizer.unk_token_id)
        self.unsaid = special_ids(tokenizer) | {tokenizer.eos_token_id, tokenizer.pad_token_id}
        self.proved: set[str] = set()
        self.is_harmony = {"<|channel|>", "<|call|>"} <= set(self.strings)
        if self.is_harmony and history == "template":
            raise ValueError(
                "environment.history=template: the template of this model splits turns by channel, which "
                "is not supported here; use environment.history=append"
            )

    def shown(self, message: Message) -> tuple[Message, bool]:
        """The message as the model gets it, its special tokens marked as text, and whether it was cut."""
        text = message["content"]
        short = text[: CHARACTERS_PER_TOKEN * self.max_answer_length]
        encoded = self._encoded(short)
        is_cut = len(short) < len(text) or len(encoded["input_ids"]) > self.max_answer_length
        if is_cut:
            kept = encoded["input_ids"][: self.max_answer_length]
            offsets = encoded.get("offset_mapping")
            short = short[: offsets[len(kept) - 1][1]] if offsets else self.tokenizer.decode(kept)
        # Above, a special token counts as one token; the model gets its letters.
        while (number := len(self._tokens(escaped(short, self.numbers), ()))) > self.max_answer_length:
            short, is_cut = short[: len(short) * self.max_answer_length // number], True
        others = {
            name: escaped(value, self.numbers)
            for name, value in message.items()
            if isinstance(value, str) and name != "role"
        }
        content = escaped(short + CUT if is_cut else short, self.numbers)
        return {**message, **others, "content": content}, is_cut

    def said(self, turn: Completion, stop_token_ids: Sequence[int]) -> tuple[str, str]:
        """(text of a turn, with marks where it spelled a token's name in letters; its sampled end of turn).
        The latter is empty if it stands in the text, or if none was sampled.
        """
        last, said = turn.token_ids[-1], escaped(turn.text, {})
        ending = self._word([last]) if last in stop_token_ids and last in self.unsaid else ""
        if any(string in said for string in self.strings):
            runs = [(i, self._word(list(run))) for i, run in groupby(turn.token_ids, self.added.__contains__)]
            if "".join(word for _, word in runs).startswith(turn.text):
                said, left = "", len(turn.text)
                for is_token, word in runs:
                    said += escaped(word[:left], {} if is_token else self.numbers)
                    left -= len(word[:left])
        return said, ending

    def _word(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def follow(self, talks: Sequence[Talk], replies: Sequence[Sequence[Message]]) -> list[Step]:
        """What comes between the last turn of each talk and its next: end of turn, messages, header.

        The messages are `shown` ones; they are added to the talks, whose text goes on with the step.

        Raises:
            ValueError: the template refuses a chat, or leaves no trace of the last turn or of a message.
        """
        pairs = list(zip(talks, replies, strict=True))
        if self.is_harmony:  # its template refuses channels in a message, and a tool that nobody called
            for talk, messages in pairs:
                talk.messages[-1] = _harmony_turn(messages, "")
            whole = [""] * len(pairs)
        else:
            whole = self._render(
                [(t.prompt, [*t.messages, *messages], t.text, messages) for t, messages in pairs]
            )
        broken = [i for i, (t, _) in enumerate(pairs) if not _goes_on(whole[i], t)]
        marked: dict[int, str] = {}
        if broken and self.history == "append":
            asked = []
            for talk, messages in (pairs[i] for i in broken):
                plain = {"role": "assistant", "content": TURN}
                turn = _harmony_turn(messages, TURN) if self.is_harmony else plain
                asked.append((talk.prompt, [*talk.messages[:-1], turn, *messages], talk.text, messages))
            marked = dict(zip(broken, self._render(asked), strict=True))
        steps = []
        for i, (talk, messages) in enumerate(pairs):
            self._prove(talk, messages)
            talk.messages += messages
            steps.append(self._step(talk, whole[i], marked.get(i), messages))
            talk.text = steps[-1].text
        return steps

    def _prove(self, talk: Talk, messages: Sequence[Message]) -> None:
        """Raises ValueError if the template silently drops messages of a role that it does not know."""
        for role in {message["role"] for message in messages} - self.proved:
            probe = {"role": role, "content": TURN}
            (text,) = self._render([(talk.prompt, [*talk.messages, probe], talk.text, [probe])])
            if TURN not in text:
                raise ValueError(
                    f"the chat template silently drops messages with role {role!r}; use an environment that "
                    "answers as user, or another template by model.chat_template"
                )
            self.proved.add(role)

    def _step(self, talk: Talk, whole: str, marked: str | None, messages: Sequence[Message]) -> Step:
        if _goes_on(whole, talk):
            rest, is_broken = whole[len(talk.text) :], False
        elif marked is None:
            return Step(self._tokens(whole, messages), whole, is_new_row=True, has_drifted=True)
        else:
            _, found, rest = marked.rpartition(TURN)
            if self.is_harmony and talk.ending in rest:
                rest = rest[rest.index(talk.ending) :]  # after the JSON of a call
            is_broken = True
            if not found:
                raise ValueError(
                    f"prompt {talk.prompt.id}: the chat template leaves out the assistant's turn, so that "
                    "nothing can be appended to it; use environment.history=template, or another template "
                    "by model.chat_template"
                )
        return Step(self._tokens(rest, messages), talk.text + rest, has_drifted=is_broken)

    def _render(self, asked: Sequence[tuple[Prompt, list[Message], str, Sequence[Message]]]) -> list[str]:
        """The text of each chat with the header of the next turn; a plain prompt is continued as text."""
        chats = {
            i: Chat(f"prompt {prompt.id}, after a turn", tuple(messages), self.tools or None)
            for i, (prompt, messages, _, _) in enumerate(asked)
            if prompt.messages
        }
        made = render_chats(self.tokenizer, list(chats.values()), self.variables, file=self.template_file)
        rendered = dict(zip(chats, made, strict=True))
        plain = [text + "".join(m["content"] for m in messages) for _, _, text, messages in asked]
        return [rendered.get(i, text) for i, text in enumerate(plain)]

    def _tokens(self, text: str, messages: Sequence[Message]) -> Tokens:
        """Ids of a text with marks; those within the content of a message have its origin."""
        spans: list[tuple[int, int, Origin]] = []
        at = len(text)
        for message in reversed(messages):
            content = message["content"].strip()
            begin = text.rfind(content, 0, at) if content else -1
            if begin >= 0:
                origin: Origin = "tool" if message["role"] == "tool" else "user"
                spans.append((begin, begin + len(content), origin))
                at = begin
        tokens: Tokens = []
        begin = 0
        for match in MARK.finditer(text):
            tokens += self._plain(text[begin : match.start()], begin, spans)
            letters = self._as_text(self.strings[int(match[1])])
            tokens.extend((i, _origin_at(match.start(), spans)) for i in letters)
            begin = match.end()
        return tokens + self._plain(text[begin:], begin, spans)

    def _plain(self, text: str, begin: int, spans: Sequence[tuple[int, int, Origin]]) -> Tokens:
        if not text:
            return []
        encoded = self._encoded(text)
        ids = encoded["input_ids"]
        offsets = encoded.get("offset_mapping") or [(0, 0)] * len(ids)
        return [(i, _origin_at(begin + a, spans)) for i, (a, _) in zip(ids, offsets, strict=True)]

    def _encoded(self, text: str) -> Any:
        has_offsets = bool(getattr(self.tokenizer, "is_fast", False))
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=has_offsets)

    def _as_text(self, string: str) -> list[int]:
        """Ids that spell the name of a special token in letters, and never the token itself.

        Raises:
            ValueError: the tokenizer knows no other way to write it.
        """
        ways = [[string[:1], string[1:]], list(string)]
        for way in ways:
            ids = [i for part in way if part for i in self._encoded(part)["input_ids"]]
            if not self.added & set(ids):
                return ids
        ids = self.tokenizer(string, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.added & set(ids):
            raise ValueError(f"the tokenizer writes {string!r} as a special token, and never as text")
        return ids


def _harmony_turn(messages: Sequence[Message], said: str) -> Any:
    """A turn that `messages` may follow: the header of a tool's answer names the tool that was called."""
    name = next((m.get("name", "") for m in messages if m["role"] == "tool"), None)
    if name is None:
        return {"role": "assistant", "content": said}
    call = {"type": "function", "function": {"name": name, "arguments": {"x": said}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _goes_on(whole: str, talk: Talk) -> bool:
    """Whether the chat begins with the row as it is, and ends the last turn as the policy did."""
    return whole.startswith(talk.text) and whole[len(talk.text) :].lstrip().startswith(talk.ending)


def _origin_at(position: int, spans: Sequence[tuple[int, int, Origin]]) -> Origin:
    for begin, end, origin in spans:
        if begin <= position < end:
            return origin
    return "scaffold"
