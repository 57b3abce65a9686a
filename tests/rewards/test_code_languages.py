"""Programs in C, C++ and JavaScript: graded by their output, confined as Python's are."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rewards.code import languages as code_languages
from rewards.code.grader import CodeOptions, close_sandboxes, grade
from rewards.code.languages import LANGUAGES, sweep_folders
from rewards.sandbox.confine import landlock_abi
from rewards.sandbox.sandbox import Sandbox, SandboxError
from rl.types import Reason, Reward
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
CASES = [{"input": "2 3\n", "output": "5\n"}, {"input": "10 -4\n", "output": "6\n"}]
COMPILERS = {"c": "gcc", "cpp": "g++", "javascript": "node"}
HEADERS = ("stdio.h", "stdlib.h", "string.h", "sys/socket.h", "unistd.h")
C = "".join(f"#include <{header}>\n" for header in HEADERS)
NODE = 'const fs = require("fs"), process_ = require("child_process");\n'

HONEST = {
    "c": C + 'int main(void) { long a, b; scanf("%ld %ld", &a, &b); printf("%ld\\n", a + b); }',
    "cpp": "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }",
    "javascript": NODE
    + 'const [a, b] = fs.readFileSync(0, "utf8").split(" ").map(Number);\n'
    + "console.log(a + b);",
}
# Each prints the right answer to the first case if its trick works.
HOSTILE = {
    "c": {
        "reads a file": 'int main(void) { if (fopen("/etc/passwd", "r")) puts("5"); }',
        "writes files": 'int main(void) { if (fopen("/tmp/PWNED_c", "w") || fopen("x", "w")) puts("5"); }',
        "forks": 'int main(void) { if (fork() >= 0) { puts("5"); sleep(60); } }',
        "executes": 'int main(void) { execl("/bin/sh", "sh", "-c", "echo 5", NULL); }',
        "opens a socket": 'int main(void) { if (socket(AF_INET, SOCK_STREAM, 0) >= 0) puts("5"); }',
        "signals": '#include <signal.h>\nint main(void) { if (kill(getppid(), 0) == 0) puts("5"); }',
        "takes memory": "int main(void) { for (;;) { char *p = malloc(1 << 26);"
        ' if (!p) { puts("5"); return 1; } memset(p, 1, 1 << 26); } }',
        "runs for ever": 'int main(void) { puts("5"); fflush(stdout); for (;;); }',
        "prints without end": 'int main(void) { for (;;) puts("5"); }',
        "includes a file": '#include "/etc/passwd"\nint main(void) { puts("5"); }',
        "embeds a file": '__asm__(".incbin \\"/etc/passwd\\"");\nint main(void) { puts("5"); }',
    },
    "cpp": {"is a template bomb": "template<int N> struct A { A<N + 1> a, b; }; A<0> x; int main() {}"},
    "javascript": {
        "reads a file": 'console.log(fs.readFileSync("/etc/passwd", "utf8").length && 5);',
        "writes a file": 'fs.writeFileSync("/tmp/PWNED_js", "x"); console.log(5);',
        "executes": 'process_.execSync("echo 5", {stdio: "inherit"});',
        "opens a socket": 'require("net").createServer().listen(0, () => { console.log(5); });',
        "takes memory": "const x = []; for (;;) x.push(new Array(1e6).fill(1.5));",
        "runs for ever": "console.log(5); for (;;);",
    },
}


@pytest.fixture(scope="module", autouse=True)
def end_sandboxes() -> Iterator[None]:
    if not landlock_abi():
        pytest.skip("this kernel has no Landlock")
    yield
    close_sandboxes()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This test's folder for temporary files; unlike `tmp_path`, the sandbox's user may enter it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def run(code: str, language: str, timeout_s: float = 60.0) -> Reward:
    if shutil.which(COMPILERS[language]) is None:
        pytest.skip(f"{COMPILERS[language]} is not installed")
    tests = {"type": "stdio", "language": language, "cases": CASES}
    options = CodeOptions(scoring="fraction", timeout_s=timeout_s, memory_mib=512, output_mib=1)
    return grade(f"```{language}\n{code}\n```", tests, options=options)


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_honest_program_gets_one_and_a_wrong_one_zero(language: str) -> None:
    assert run(HONEST[language], language).score == 1.0
    wrong = run(HONEST[language].replace("a + b", "a - b"), language)
    assert (wrong.score, wrong.reason) == (0.0, Reason.WRONG_ANSWER)


@pytest.mark.parametrize(
    ("language", "trick"), [(name, trick) for name in HOSTILE for trick in HOSTILE[name]]
)
def test_a_hostile_program_gets_zero_and_leaves_nothing(language: str, trick: str, temporary: Path) -> None:
    header = {"c": C, "cpp": "", "javascript": NODE}[language]
    code = header + HOSTILE[language][trick]
    reward = run(code, language, timeout_s=1.0 if "for ever" in trick else 60.0)
    assert reward.score == 0.0, reward
    assert trick != "prints without end" or reward.reason is Reason.OUTPUT_LIMIT
    assert [*Path("/tmp").glob("PWNED*"), *temporary.iterdir()] == []


def test_a_program_that_holds_all_threads_leaves_other_workers_alone() -> None:
    hold = "#include <pthread.h>\nvoid *wait(void *x) { for (;;) pause(); }\nint main(void) { pthread_t t;"
    hold += " pthread_attr_t a; pthread_attr_init(&a); pthread_attr_setstacksize(&a, 65536);"
    hold += " for (;;) if (pthread_create(&t, &a, wait, 0)) usleep(1000); }"
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(run, C + hold, "c", timeout_s=250.0)
        try:
            wait_until(holds_all, "it starts no more threads", 120)
            for language in ("c", "javascript"):
                reward = run(HONEST[language], language)
                assert reward.score == 1.0, reward
            assert not holding.done(), "the holding ended too early to prove anything"
        finally:
            while not holding.done():  # at each of the cases
                for found in holders():
                    found.kill()
                time.sleep(0.05)
        assert holding.result().score == 0.0


def holders() -> dict[psutil.Process, int]:
    """Programs below this process that have more than 16 threads, and their number."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "main" and (number := process.num_threads()) > 16:
                found[process] = number
    return found


def holds_all() -> bool:
    before = holders()
    time.sleep(0.3)
    return bool(before) and holders() == before


def test_a_compiler_that_is_ended_leaves_no_process(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_languages, "COMPILE_TIMEOUT_S", 1.0)
    endless = '#if __INCLUDE_LEVEL__ < 40\n#include "main.c"\n#include "main.c"\n#endif\n'
    set_child_subreaper = ctypes.CDLL(None).prctl
    set_child_subreaper(36, 1, 0, 0, 0)  # orphans come to this process
    try:
        reward = run(endless, "c")
        children = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
        names = [Path(f"/proc/{pid}/comm").read_text() for pid in " ".join(children).split()]
    finally:
        set_child_subreaper(36, 0, 0, 0, 0)
    assert (reward.score, reward.reason) == (0.0, Reason.TIMEOUT)
    assert not {"cc1\n", "as\n"} & set(names), names
    assert [*temporary.iterdir()] == []


@pytest.mark.parametrize("language", ["c", "javascript"])
def test_a_strict_umask_of_the_owner_does_not_keep_programs_from_their_source(language: str) -> None:
    before = os.umask(0o077)
    try:
        assert run(HONEST[language], language).score == 1.0
    finally:
        os.umask(before)


def test_a_program_that_does_not_compile_is_a_parse_error() -> None:
    reward = run("int main( {", "c")
    assert (reward.score, reward.reason) == (0.0, Reason.PARSE_ERROR)
    assert "error" in reward.detail


HOLDER = """import sys, time
from rewards.code.languages import LANGUAGES, Language, prepared
from rewards.sandbox.sandbox import Limits
LANGUAGES["text"] = Language("main.txt", "", sys.executable)
class Giver:
    def give(self, folder): print(folder, flush=True)
with prepared("x", "text", Limits(), Giver()):
    time.sleep(60)
"""


def test_a_folder_goes_with_the_next_start_when_its_owner_was_killed(temporary: Path) -> None:
    """And only then: not that of a living process, of another user, or where a link leads."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]
    living, dead = (Path(process.stdout.readline().strip()) for process in started)  # pyright: ignore
    started[1].kill()
    started[1].wait()
    outside, link = temporary / "outside", temporary / "cohort-code-link"
    outside.mkdir()
    (outside / "kept").touch()
    link.symlink_to(outside)
    (dead / "link").symlink_to(outside)
    foreign = temporary / "cohort-code-foreign"
    foreign.mkdir()
    if os.getuid() == 0:
        os.chown(foreign, 1000, 1000)
    try:
        assert dead.exists()
        sweep_folders(str(temporary))
        assert (living.exists(), dead.exists(), link.is_symlink()) == (True, False, True)
        assert (outside / "kept").exists() and foreign.exists() == (os.getuid() == 0)
    finally:
        started[0].kill()
        started[0].wait()


def test_asserts_in_another_language_abstain() -> None:
    tests = {"type": "asserts", "language": "c", "entry_point": "add", "code": "assert add(1, 1) == 2"}
    reward = grade("int add;", tests)
    assert (reward.score, reward.reason) == (None, Reason.BAD_GOLD)
    assert "c needs type 'stdio'" in reward.detail


def test_without_landlock_other_languages_are_refused_with_the_reason() -> None:
    with pytest.raises(SandboxError, match="need Landlock"):
        Sandbox(num_workers=1, commands=True, tier="seccomp")
