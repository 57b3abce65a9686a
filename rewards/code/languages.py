"""Languages other than Python, as command templates. Their programs are graded by their output."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rewards.sandbox.sandbox import Command, Limits, RunResult, Sandbox, SandboxError

PREFIX = "cohort-code-"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
FIRST_OWN_UID = 1_879_048_192  # user ids of sandboxes that root starts, as in `rewards.sandbox.zygote`
COMPILE_TIMEOUT_S = 30.0
COMPILE_MEMORY_MIB = 2048


@dataclass(frozen=True, slots=True)
class Language:
    """The words of two commands, in which {source}, {folder} and {memory_mib} are filled in.

    `address_space` is False if the runtime reserves far more addresses than it uses memory; then the memory
    limit counts data only.
    """

    file: str
    compile: str
    run: str
    address_space: bool = True


NODE = "node --max-old-space-size={memory_mib} --stack-size=4000 {source}"
LANGUAGES: dict[str, Language] = {
    "c": Language("main.c", "gcc -std=gnu17 -O2 -pipe -o {folder}/main {source} -lm", "{folder}/main"),
    "cpp": Language("main.cpp", "g++ -std=gnu++20 -O2 -pipe -o {folder}/main {source}", "{folder}/main"),
    "javascript": Language("main.js", "", NODE, address_space=False),
}


@contextlib.contextmanager
def prepared(code: str, language: str, limits: Limits, sandbox: Sandbox) -> Iterator[Command | RunResult]:
    """The command that runs compiled `code`, or a failed compilation's result. Its folder goes at the end.

    Raises:
        SandboxError: the compiler or interpreter of the language is not installed.
    """
    template = LANGUAGES[language]
    sweep_folders(tempfile.gettempdir())
    folder, lock = _locked_folder()
    try:
        source = Path(folder, template.file)
        source.write_bytes(code.encode("utf-8", "surrogatepass"))
        sandbox.give(folder)
        fields = {"source": str(source), "folder": folder, "memory_mib": str(limits.memory_mib)}
        if template.compile:
            compiler = Command(_filled(template.compile, fields), folder, compiles=True)
            build_limits = Limits(COMPILE_TIMEOUT_S, COMPILE_MEMORY_MIB, limits.output_mib)
            built = sandbox.run_command(compiler, limits=build_limits)
            if built.exit_code != 0:
                yield built
                return
        yield Command(_filled(template.run, fields), folder, address_space=template.address_space)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder() -> tuple[str, int]:
    """A new folder, and a descriptor whose lock is released when this process ends, even by kill -9."""
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        with contextlib.suppress(OSError):  # another process swept it before it was locked
            descriptor = os.open(folder, FOLDER)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_at(descriptor, folder):
                return folder, descriptor
            os.close(descriptor)


@functools.cache
def sweep_folders(parent: str) -> None:
    """Removes the folders of killed processes, once per process: those of our user, or those that root gave
    to a sandbox, that no living process has locked. Follows no links.
    """
    for folder in Path(parent).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, FOLDER)
            try:
                owner = os.fstat(descriptor).st_uid
                is_own = owner == os.geteuid() or (os.geteuid() == 0 and owner >= FIRST_OWN_UID)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_own and _is_at(descriptor, str(folder)):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _is_at(descriptor: int, folder: str) -> bool:
    return os.path.samestat(os.fstat(descriptor), os.lstat(folder))


def _filled(template: str, fields: dict[str, str]) -> tuple[str, ...]:
    program, *arguments = (word.format_map(fields) for word in template.split())
    found = program if os.path.isabs(program) else shutil.which(program)
    if found is None:
        raise SandboxError(f"{program} is not installed here; install it, or drop prompts that need it")
    return (os.path.realpath(found), *arguments)
