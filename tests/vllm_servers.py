"""Real vLLM servers on this machine's CPU, as `cohort serve` starts them, but with forks for processes."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from rollout.vllm.lock import LOCK, RECEIVER, SCHEDULER

START_S = 240.0
SERVER = "vllm.entrypoints.openai.api_server"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def end_with_us(group: int) -> subprocess.Popen[bytes]:
    """Kills a process group when this process ends, however it ends. A stopped server would hear no SIGTERM.

    Kill what this returns before the group: its number may be another one's then.
    """
    code = f"import os, sys; sys.stdin.read(); os.killpg({group}, {signal.SIGKILL:d})"
    return subprocess.Popen([sys.executable, "-Sc", code], stdin=subprocess.PIPE, start_new_session=True)


def serve() -> None:
    """vLLM's server, whose engine and workers are forks. On a CPU vLLM would spawn them, and each would
    import it again: a server answers after 26 s of work, and after 14 s this way.
    """
    from vllm.utils import system_utils

    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import rollout.vllm.worker  # noqa: F401

    runpy.run_module(SERVER, run_name="__main__")


class ServerProcess:
    """A server in a process group of its own, which ends with all of its processes, or with the tests."""

    def __init__(
        self,
        model: Path,
        token_file: Path,
        log: Path,
        *,
        port: int = 0,
        reads_text: bool = False,
        extension: bool = True,
        has_lock: bool = True,
        **options: Any,
    ) -> None:
        self.port, self.log = port or free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        options = {
            "dtype": "float32",
            "max-model-len": 128,
            "max-num-seqs": 32,
            "kv-cache-memory-bytes": "64M",
            "logprobs-mode": "processed_logprobs",
            "stream-interval": 8,
            "scheduler-cls": SCHEDULER,
        } | options
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "tests.vllm_servers", "--model", str(model), *words]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", "--enable-scale-out"]
        command += ["--worker-extension-cls", RECEIVER] if extension else []
        command += ["--middleware", LOCK] if has_lock else []
        command += ["--seed", "0"]
        command += [] if reads_text else ["--skip-tokenizer-init"]
        command += ["--block-size", "32", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "COHORT_TOKEN_FILE": str(token_file),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        }
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        self._end = end_with_us(self.process.pid)

    def wait(self) -> ServerProcess:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, (
                f"no server within {START_S} s: {self.log.read_text()[-3000:]}"
            )
            time.sleep(0.5)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self._end.kill()
        self._end.wait(30)
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
        self.process.wait(30)


if __name__ == "__main__":
    serve()
