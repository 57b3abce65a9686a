"""Python per token around a vLLM server: in its API process, and on our side of the streams.

    python -m tests.bench.server_tokens [--running 120] [--tokens 600]

Microseconds of CPU time, with a tiny random model on a CPU; the core, which computes it there, is left out.
With vLLM's own scheduler every token is a message of the core's, with ours 64 of them are.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from queue import SimpleQueue

import psutil

from rl.types import SamplingParams
from rollout.vllm import served
from rollout.vllm.core import Stream
from rollout.vllm.lock import SCHEDULER, make_token, read_token
from rollout.vllm.served import Server
from tests.bench.workload import Workload, write_model
from tests.vllm_servers import ServerProcess

STOCK = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
CASES = (
    ("vLLM's scheduler, one pool", STOCK, 1),
    ("vLLM's scheduler", STOCK, served.NUM_POOLS),
    ("in parts", SCHEDULER, served.NUM_POOLS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=600)
    arguments = parser.parse_args()
    print(f"{'':34s}{'API process':>14s}{'ours':>8s}   us a token")
    for name, path, pools in CASES:
        served.NUM_POOLS = pools
        theirs, ours = measure(path, arguments.running, arguments.tokens)
        print(f"{name:34s}{theirs:14.1f}{ours:8.1f}", flush=True)


def measure(scheduler: str, running: int, length: int) -> tuple[float, float]:
    """Microseconds per token of the API process, and of this process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, token = write_model(Path(scratch) / "model", Workload(shape="tiny")), Path(scratch) / "token"
        make_token(token)
        options = {"max-model-len": length + 8, "max-num-seqs": running, "kv-cache-memory-bytes": "2G"}
        options |= {"scheduler-cls": scheduler, "stream-interval": 64}
        process = ServerProcess(folder, token, Path(scratch) / "log", **options).wait()
        sink: SimpleQueue[tuple[Server, Stream]] = SimpleQueue()
        server = Server(process.url, read_token(token), salt="s", sink=sink)
        spent = [0.0, 0.0]
        try:
            server.holds(0, "default")  # vLLM's label of weights that nobody has replaced
            for turn in range(2):  # the first one warms up
                before = times(process)
                for k in range(running):
                    one = Stream(
                        f"{turn}.{k}", [5, 6 + k % 50], SamplingParams(length), k, with_logprobs=True
                    )
                    server.start([one])
                ended = [sink.get(timeout=600)[1] for _ in range(running)]
                spent = [now - then for now, then in zip(times(process), before, strict=True)]
                assert all(len(one.token_ids) == length for one in ended), server.fault
        finally:
            server.close()
            process.kill()
    theirs, ours = (1e6 * seconds / (running * length) for seconds in spent)
    return theirs, ours


def stream(name: str, seed: int, length: int) -> Stream:
    return Stream(name, [5, 6 + seed % 50], SamplingParams(length), seed, with_logprobs=True)


def times(process: ServerProcess) -> list[float]:
    """CPU seconds of the API process and of this one."""
    api = psutil.Process(process.process.pid).cpu_times()
    return [api.user + api.system, time.process_time()]


if __name__ == "__main__":
    main()
