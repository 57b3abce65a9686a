"""Grades cases in one setting and reports what it got and what was left behind. Run as a program:

    python grade_cases.py CASES.json TIER  ->  {"scores": [...], "tier", "left": [...]} on stdout

CASES.json: [{"code", "tests", "timeout_s"}, ...]. The process may be root or not, and inside a filter as
containers have.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rewards.code import CodeOptions, code_sandbox, grade

FOLDERS = ("/tmp", "/dev/shm", "/var/tmp", ".")
OWN_UIDS_FROM = 1_879_048_192  # where a sandbox of root takes its user ids from


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
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
    uids = {os.getuid()} if os.getuid() else {OWN_UIDS_FROM + pid for pid in (os.getpid(), *zygotes)}
    left = [*(_files() - before), *_processes(uids), *_sockets(uids)]
    print(json.dumps({"scores": scores, "tier": tier, "left": left}))


def _files() -> set[str]:
    """Names in shared folders that are ours: by owner, or by the names that attacks use."""
    found = set()
    for folder in FOLDERS:
        for path in Path(folder).iterdir():
            try:
                uid = path.lstat().st_uid
            except OSError:
                continue
            ours = uid >= OWN_UIDS_FROM or (uid == os.getuid() and uid != 0)
            if ours or "PWNED" in path.name or path.suffix == ".pth":
                found.add(str(path))
    return found


def _processes(uids: set[int]) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                status = Path("/proc", entry, "status").read_text()
            except OSError:
                continue
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            child = int(fields["PPid"]) == os.getpid()
            if child or {int(uid) for uid in fields["Uid"].split()} & uids:
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
