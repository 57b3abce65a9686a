"""`cohort serve` for a benchmark's time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from rollout.vllm.lock import read_token
from tests.vllm_servers import free_port

START_S = 400.0


@contextmanager
def serving(
    model: Path, log: Path, token: Path, *options: str, devices: Sequence[int] = ()
) -> Iterator[list[str]]:
    """The URLs of servers of `model`, one for each device, or one on a CPU; what they say is in `log`."""
    port, count = free_port(), max(1, len(devices))
    words = [str(model), "--port", str(port), "--token-file", str(token), *options]
    words += ["--devices", ",".join(map(str, devices))] if devices else []
    words += [] if devices else ["--kv-cache-memory-bytes", str(2**26)]
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "recipes.cli", "serve", *words], stdout=subprocess.PIPE, stderr=file
        )
    try:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        while not (process.stdout.read() or b"").endswith(b"\n"):
            late = time.monotonic() - began > START_S
            if process.poll() is not None or late:
                raise SystemExit(f"no server: {log}: {log.read_text(errors='replace')[-6000:]}")
            time.sleep(0.2)
        print(f"{count} server(s) of {model.name} after {time.monotonic() - began:.0f} s", flush=True)
        yield [f"http://127.0.0.1:{port + k}" for k in range(count)]
    except BaseException:
        print(log.read_text(errors="replace")[-5000:], flush=True)
        raise
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        process.wait(60)


class Idle:
    """Asks servers how many completions they run; `share()`: of the answers so far, how many were zero.

    An answer counts from a server's first completion to its last.
    """

    def __init__(self, urls: Sequence[str], token: Path) -> None:
        self._urls, self._seen = urls, [[] for _ in urls]
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {read_token(token)}"}, timeout=5.0, trust_env=False
        )

    def __call__(self) -> None:
        for url, seen in zip(self._urls, self._seen, strict=True):
            text = self._client.get(f"{url}/metrics").raise_for_status().text
            running = re.findall(r"^vllm:num_requests_running\{.*\} ([\d.e+]+)$", text, re.MULTILINE)
            seen.append(sum(map(float, running)) > 0)

    def share(self) -> float:
        used = [s[s.index(True) : len(s) - s[::-1].index(True)] for s in self._seen if any(s)]
        answers = [busy for seen in used for busy in seen]
        return 1 - sum(answers) / len(answers) if answers else float("nan")
