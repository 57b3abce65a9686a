"""Grades cases in one setting and reports what it got and what was left behind. Run as a program:

    python grade_cases.py CASES.json TIER  ->  {"scores": [...], "tier", "left": [...]} on stdout

CASES.json: [{"code", "tests", "timeout_s"}, ...]. The process may be root or not, and inside a filter as
containers have.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

from rewards.code.grader import CodeOptions, code_sandbox, grade

FOLDERS = ("/tmp", "/dev/shm", "/var/tmp", ".")
MODULES = ("sitecustomize", "usercustomize", "json", "unittest", "conftest", "numpy")
PLANTED = {"/dev/shm/x", *(f"{module}.py" for module in MODULES)}  # what attacks make, besides PWNED
PR_SET_CHILD_SUBREAPER = 36
OWN_UIDS_FROM = 1_879_048_192  # where a sandbox of root takes its user ids from


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    # What a sandbox leaves behind, even in a session of its own, becomes a child of this process.
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    before = _files()
    with code_sandbox(num_workers=2, tier=sys.argv[2]) as sandbox:  # pyright: ignore
        zygotes = set(sandbox.zygote_pids())

        def one(case: dict[str, Any]) -> float | None:
            options = CodeOptions(timeout_s=case["timeout_s"])
            score = grade(case["code"], case["tests"], options=options, sandbox=sandbox).score
            zygotes.update(sandbox.zygote_pids())
            return score

        scores = sandbox.map(one, cases)
        tier = sandbox.tier
    # Another user's sandboxes have no id of their own: their files are known by name, and a socket by the
    # process that holds it.
    uids = set() if os.getuid() else {OWN_UIDS_FROM + pid for pid in (os.getpid(), *zygotes)}
    new = _files() - before
    left = [path for path, uid in new if uid in uids or "PWNED" in path or path in PLANTED]
    left += [*_processes(zygotes), *_sockets(uids)]
    print(json.dumps({"scores": scores, "tier": tier, "left": left}))


def _files() -> set[tuple[str, int]]:
    """(path, owner) of what is in shared folders."""
    found = set()
    for folder in FOLDERS:
        for path in Path(folder).iterdir():
            with contextlib.suppress(OSError):
                found.add((str(path), path.lstat().st_uid))
    return found


def _processes(zygotes: set[int]) -> list[str]:
    """Children of this process: zygotes, and orphans that are not dead."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                status = Path("/proc", entry, "status").read_text()
            except OSError:
                continue
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            is_dead_orphan = fields["State"].startswith("Z") and int(entry) not in zygotes
            if int(fields["PPid"]) == os.getpid() and not is_dead_orphan:
                found.append(f"process {entry} {fields['Name']} {fields['State']}")
    return found


def _sockets(uids: set[int]) -> list[str]:
    found = []
    for name in ("tcp", "tcp6", "udp", "udp6"):
        table = Path("/proc/net", name)
        if table.exists():
            found += [
                f"{name} {line}"
                for line in table.read_text().splitlines()[1:]
                if int(line.split()[7]) in uids
            ]
    return found


if __name__ == "__main__":
    main()
