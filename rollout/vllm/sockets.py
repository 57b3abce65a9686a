"""The folder of the sockets where a trainer and its engine's own process meet."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

MAX_FOLDER = 107 - len("/cohort-12345678/") - 36  # the kernel's limit for a socket's path; vLLM adds a UUID


@contextmanager
def sockets_of_one_start() -> Iterator[None]:
    """A folder for the sockets where trainer and core meet; it goes once they have met, or did not.

    vLLM leaves them in the temporary folder for good. A connected socket needs no name, so that whatever is
    killed later leaves nothing behind.
    """
    before = os.environ.get("VLLM_RPC_BASE_PATH")
    parents = [before or tempfile.gettempdir(), "/tmp"]
    parent = next((p for p in parents if len(p) <= MAX_FOLDER and os.access(p, os.W_OK)), parents[0])
    folder = tempfile.mkdtemp(prefix="cohort-", dir=parent)
    os.environ["VLLM_RPC_BASE_PATH"] = folder
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["VLLM_RPC_BASE_PATH"]
        if before is not None:
            os.environ["VLLM_RPC_BASE_PATH"] = before
