"""Starts a script as one process or as two gloo ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore


def launch(script: Path, arguments: Sequence[str], size: int) -> None:
    # The ranks meet at a store of this process, as under torchrun: its port cannot be taken by another.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"OMP_NUM_THREADS": "1"}
    if size > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    try:
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
            command = [sys.executable, str(script), *arguments]
            children.append(subprocess.Popen(command, env=os.environ | shared | own))
        assert [child.wait(timeout=560) for child in children] == [0] * size
    finally:
        for child in children:
            child.kill()
            child.wait()
