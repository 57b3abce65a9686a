"""Confines programs in other languages and their compilers. Runs inside a forked child.

Landlock is required: these programs open files, and without it they could open every file. A run may
read system libraries and its own folder, write nothing, and start no process; a compilation may also use
the system's compilers, start processes, and write its folder.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from rewards.sandbox import confine

COMPILER_FILE_BYTES = 64 << 20
RUNTIME_BYTES, THREAD_STACK_BYTES = 256 << 20, 8 << 20
READ_FOLDER = confine.LANDLOCK_READ | confine.LANDLOCK_READ_DIR
LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")
LIBRARY_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
# they may hold anything, datasets included
OTHER_LANGUAGES = ("python", "node_modules", "ruby", "perl", "R")
TOOLS = ("/bin", "/usr/bin", "/usr/include", "/usr/local/include", "/usr/libexec", "/etc/alternatives")
SMALL_FILES = ("/etc/ld.so.cache", "/dev/urandom", "/dev/random", "/dev/zero")


def enter_command(program: Mapping[str, Any], abi: int) -> None:
    """Confines this process to the files of a command and changes to its folder.

    `program`: "command", "folder", "compiles", "address_space", "memory_bytes", "output_bytes".
    """
    os.setpgid(0, 0)  # so that a compiler's children can be ended with it
    os.chdir(program["folder"])
    os.umask(0o007)  # other workers, users of the same group, run what is compiled here
    confine.restrict_files(_rules(program), abi)
    if program["address_space"]:
        confine.lower_limit(resource.RLIMIT_AS, program["memory_bytes"])
    else:
        confine.lower_limit(resource.RLIMIT_DATA, program["memory_bytes"] + RUNTIME_BYTES)
        confine.lower_limit(resource.RLIMIT_STACK, THREAD_STACK_BYTES)  # also the stack size of each thread
    file_bytes = max(program["output_bytes"], COMPILER_FILE_BYTES if program["compiles"] else 0)
    confine.lower_limit(resource.RLIMIT_FSIZE, file_bytes)


def become_command(program: Mapping[str, Any]) -> NoReturn:
    """Replaces this confined process by the command."""
    folder = program["folder"]
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder}
    environment["OPENSSL_CONF"] = "/dev/null"  # node exits if it may not read the system's file
    for number in (signal.SIGXFSZ, signal.SIGPIPE):  # Python ignores them, and a command would inherit that
        signal.signal(number, signal.SIG_DFL)
    os.execve(program["command"][0], program["command"], environment)


def _rules(program: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    compiles, run = program["compiles"], confine.LANDLOCK_EXECUTE | confine.LANDLOCK_READ
    yield "/dev/null", confine.LANDLOCK_READ | confine.LANDLOCK_WRITE
    yield program["folder"], confine.LANDLOCK_EVERYTHING if compiles else READ_FOLDER
    for path in (program["command"][0], *LOADERS, *(f"/usr{loader}" for loader in LOADERS)):
        yield path, run
    for path in SMALL_FILES:
        yield path, confine.LANDLOCK_READ
    for path in (*_library_entries(), *(TOOLS if compiles else ())):
        yield path, READ_FOLDER | (confine.LANDLOCK_EXECUTE if compiles else 0)


def _library_entries() -> Iterator[str]:
    for folder in sorted({os.path.realpath(path) for path in LIBRARY_FOLDERS}):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if not name.startswith(OTHER_LANGUAGES):
                yield os.path.join(folder, name)
