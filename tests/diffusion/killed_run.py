"""A run that SIGKILLs itself on entering the training phase for the N-th time.

`python killed_run.py N ARGUMENT...` takes the arguments of recipes.llada. A process of its own, since a fork
of one that has computed may crash inside torch.
"""

from __future__ import annotations

import os
import signal
import sys

from recipes.llada import main
from rl.phases import Phases


def kill_on_entry(phase: str, number: int) -> None:
    entries = []
    original = Phases.__call__

    def entering(self: Phases, name: str):
        entries.append(name)
        if entries.count(phase) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, name)

    Phases.__call__ = entering


if __name__ == "__main__":
    kill_on_entry("train", int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
