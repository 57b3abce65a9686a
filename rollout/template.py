"""Renders chats by a model's own Jinja template, in a child process that dies if a template takes too much.

transformers renders in a sandbox that keeps a template from the file system and from Python's internals. It
bounds neither time nor memory: nested loops, or a string that is repeated or doubled, can use up both.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError

from rl.types import Message

CPU_S = 10.0  # of one chat; a thousand times what a long one takes
STALL_S = 300  # wall clock of one chat: ends a child that waits for a lock it cannot get
MEMORY_BYTES = 1 << 30  # beyond what this process has
MAX_CHARACTERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Chat:
    """What a template renders.

    Attributes:
        where: the row, for errors.
        is_continued: the last message is the assistant's and is left open.
    """

    where: str
    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    is_continued: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of a chat, or why there is none; `is_bomb`: the template took more than it may."""

    text: str = ""
    fault: str = ""
    is_bomb: bool = False


def render_chats(
    tokenizer: Any, chats: Sequence[Chat], variables: Mapping[str, Any], *, file: str | None
) -> list[str]:
    """The text of each chat, followed by the header of the completion.

    Args:
        variables: the template's own, such as enable_thinking.
        file: where the template was read from; None: the tokenizer's own.

    Raises:
        ValueError: there is no template; it refuses a chat, fails on it, or takes too much time, memory or
            text; or it has no place for the tools or a variable.
    """
    if not chats:
        return []
    _check_variables(tokenizer, variables, has_tools=any(chat.tools for chat in chats))
    texts = []
    for chat, answer in zip(chats, _answers(tokenizer, chats, variables), strict=True):
        if answer.fault:
            raise ValueError(f"{chat.where}: {_said(tokenizer, answer, file)}")
        texts.append(answer.text)
    return texts


def check_template(tokenizer: Any, *, file: str | None) -> None:
    """Renders one short chat. A template that refuses it may still take others.

    Raises:
        ValueError: the template takes too much time, memory or text.
    """
    if not tokenizer.chat_template:
        return
    probe = Chat("a short chat", ({"role": "user", "content": "Hello"},))
    for answer in _answers(tokenizer, [probe], {}):
        if answer.is_bomb:
            raise ValueError(f"{probe.where}: {_said(tokenizer, answer, file)}")


def _check_variables(tokenizer: Any, variables: Mapping[str, Any], *, has_tools: bool) -> None:
    """Raises ValueError if there is no chat template, or if it does not read a variable or the tools."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, but the prompts are chats; set model.chat_template to a "
            "Jinja file, use the instruct model, or data.chat=false for plain text"
        )
    found = tokenizer.chat_template
    names = set(re.findall(r"[A-Za-z_]\w*", found if isinstance(found, str) else " ".join(found.values())))
    for name in variables:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(
                f"data.chat_template_kwargs has {name!r}, but the chat template reads no such variable"
                + (f"; did you mean {near[0]!r}?" if near else "; leave it out")
            )
    if has_tools and "tools" not in names:
        raise ValueError(
            "the prompts come with tools, but the chat template has no place for them; set "
            "model.chat_template to one that has. Tools are those of the environment, or a column 'tools' of "
            "the rows, which data.rename={tools: ...} gives another name"
        )


def _said(tokenizer: Any, answer: Answer, file: str | None) -> str:
    own = Path(str(tokenizer.name_or_path))
    files = [own / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    origin = f"read from {file or next((path for path in files if path.is_file()), own)}"
    if answer.is_bomb:
        return (
            f"the chat template, {origin}, {answer.fault}; take another, by model.chat_template, or a model "
            "whose template you trust"
        )
    return (
        f"the chat template refuses the messages ({answer.fault}); it was {origin}: change the messages or "
        "data.system_prompt, or set model.chat_template to another Jinja file"
    )


def _answers(tokenizer: Any, chats: Sequence[Chat], variables: Mapping[str, Any]) -> Iterator[Answer]:
    """An answer for each chat, in order, up to the first one that the child did not survive."""

    def render(chat: Chat) -> str:
        return tokenizer.apply_chat_template(
            list(chat.messages),
            tools=chat.tools,
            tokenize=False,
            add_generation_prompt=not chat.is_continued,
            continue_final_message=chat.is_continued,
            **variables,
        )

    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The child renders and writes; it takes none of the locks that other threads may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reading)
        _render_and_exit(render, chats, writing)
    os.close(writing)
    num_answers = 0
    try:
        with open(reading, encoding="utf-8") as pipe:
            for line in pipe:
                if line.endswith("\n"):
                    num_answers += 1
                    yield Answer(**json.loads(line))
    finally:
        if num_answers < len(chats):
            os.kill(child, signal.SIGKILL)  # the reader stopped early, or the child is dead already
        status = os.waitpid(child, 0)[1]
    if num_answers < len(chats):
        yield Answer(fault=_death(status), is_bomb=True)


def _death(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGPROF:
        return f"computes for more than {CPU_S:g} s"
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"takes more than its process may ({ended})"


def _render_and_exit(render: Callable[[Chat], str], chats: Sequence[Chat], writing: int) -> NoReturn:
    """The child's whole life. The kernel ends it by a signal's default action, whatever Python is doing."""
    try:
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory()
        with open(writing, "w", encoding="utf-8") as pipe:
            for chat in chats:
                signal.setitimer(signal.ITIMER_PROF, CPU_S)
                signal.alarm(STALL_S)
                pipe.write(json.dumps(_answer(render, chat)) + "\n")
    except BaseException:
        os._exit(1)
    os._exit(0)


def _answer(render: Callable[[Chat], str], chat: Chat) -> dict[str, Any]:
    try:
        text = render(chat)
    except Exception as error:  # a template may do anything to its messages
        kind, said = type(error).__name__, " ".join(str(error).split())
        if isinstance(error, MemoryError | RecursionError | OverflowError):
            return {"fault": f"takes too much: {kind} {said}".strip(), "is_bomb": True}
        return {"fault": (said or kind) if isinstance(error, TemplateError) else f"{kind}: {said}"}
    if len(text) > MAX_CHARACTERS:
        return {"fault": f"writes {len(text):,} characters for one chat", "is_bomb": True}
    return {"text": text}


def _limit_memory() -> None:
    if not (statm := Path("/proc/self/statm")).exists():
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
