"""What a trainer asks of a vLLM server besides samples: facts, pauses, weights, proofs. It imports no vLLM.

Weights go through methods of `rollout.vllm.worker.WeightReceiver`, which vLLM's `/collective_rpc` reaches,
and not through a backend of vLLM's weight transfer. So the same calls work in every version since 0.25.1. One
call checks, loads and notes what is held. A fault comes back as an answer and does not end the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from typing import Any

import httpx
import torch

from rollout.engine import EngineError
from rollout.fingerprint import HeldTensor, mismatches
from rollout.vllm.core import UNREAD, unread
from rollout.vllm.lock import RECEIVER, SAMPLED
from rollout.vllm.weight_files import Push

NEEDED = ("/pause", "/resume", "/collective_rpc", "/server_info", "/version")
LACKS_ROUTES = "lacks --enable-return-routed-experts"
ROUTES = "enable_return_routed_experts"  # in vLLM's config, in 0.32 and in 0.25 in different places
CONNECT_S = 10.0
CONFIG = ("dtype", "max_model_len", "logprobs_mode", "routes", "worker_extension_cls")
CONFIG += ("tensor_parallel_size", "world_size", "data_parallel_size", "enable_expert_parallel")
LEASE_S = 120.0  # a killed run keeps its servers from others for this long


class ServerDead(EngineError):
    """A server does not answer, or its engine has failed: it samples nothing until it is started again."""


class NoRoute(ValueError):
    """A server has no such route."""


class PushRefused(EngineError):
    """A server did not load the weights; it says why, and goes on with those it holds, if any."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server is and offers.

    Attributes:
        vllm: its version.
        dtype: of its weights, as torch names it.
        vocab_size: None without our worker extension, which tells it.
        has_generate: it has `/inference/v1/generate`, with token ids in and out.
        has_spans: its answers say which weights sampled which tokens.
        has_receiver: it has our worker extension, for fingerprints and deltas.
        logprobs_mode: vLLM's name for the log-probs that it answers with.
        num_workers: its tensor parallelism.
        has_routes: its answers say which experts computed each token.
        has_lock: it has our lock, which counts what it has sampled at a pause.
    """

    vllm: str
    dtype: str
    max_model_len: int
    vocab_size: int | None
    has_generate: bool
    has_spans: bool
    has_receiver: bool
    logprobs_mode: str
    num_workers: int
    has_routes: bool
    has_lock: bool


def of_worker(number: int) -> str:
    """What follows the name of a tensor of this worker: its number; nothing for the first worker."""
    return f" (worker {number})" if number else ""


class Control:
    """Calls to one server, on connections of their own: streams of samples do not hold them up.

    Every call is bounded by `timeout_s` and names what it waits for. Faults never contain the token.

    Args:
        url: such as http://127.0.0.1:8000.
        token: what the server's lock asks for (`rollout.vllm.lock`).
        timeout_s: longest wait for one answer.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 300.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
            limits=httpx.Limits(max_keepalive_connections=0),  # the server closes idle ones at any time
            trust_env=False,
        )
        self._facts: Facts | None = None
        self._held: Mapping[str, HeldTensor] = {}

    def facts(self) -> Facts:
        """What the server's routes and config show; they are asked for once.

        Raises:
            ValueError: the server is not vLLM with its development routes, or is parallel in other ways than
                by tensors.
        """
        if self._facts is None:
            paths = self.call("GET", "/openapi.json", "the list of routes", itemgetter("paths"))
            if missing := [path for path in NEEDED if path not in paths]:
                raise ValueError(
                    f"server {self.url} lacks {', '.join(missing)}; start it with `cohort serve`, or "
                    "vLLM's own server with VLLM_SERVER_DEV_MODE=1"
                )
            shown = self.call("GET", "/server_info?config_format=json", "its config", _read_config)
            workers, number = shown["tensor_parallel_size"], shown["world_size"] * shown["data_parallel_size"]
            if number > workers or (number > 1 and shown["enable_expert_parallel"]):
                raise ValueError(
                    f"server {self.url} spreads its model over {number} workers by more than tensor "
                    "parallelism, which cannot be proved; start it with --tensor-parallel-size alone, or one "
                    "server for each device (cohort serve --devices 0,1)"
                )
            if shown["apis"] > 1:
                raise ValueError(
                    f"server {self.url} has {shown['apis']} API processes, each of which knows only its own "
                    "completions; start it with --api-server-count 1"
                )
            has_receiver = shown["worker_extension_cls"] == RECEIVER
            told = self._rpc("cohort_facts")[0] if has_receiver else {}
            self._facts = Facts(
                self.call("GET", "/version", "its version", itemgetter("version")),
                shown["dtype"].removeprefix("torch."),
                shown["max_model_len"],
                told.get("vocab_size"),
                "/inference/v1/generate" in paths,
                "/weight_info" in paths,
                has_receiver,
                shown["logprobs_mode"],
                workers,
                shown["routes"],
                self._has_lock(),
            )
        return self._facts

    def _has_lock(self) -> bool:
        try:
            self.call("GET", SAMPLED, "its lock")
        except ValueError as fault:  # or it has not counted yet
            return not isinstance(fault, NoRoute)
        return True

    def pause(self) -> None:
        """Holds all requests where they are, with no step in flight; safe to call twice."""
        self.call("POST", "/pause", "the pause", params={"mode": "keep", "clear_cache": "false"})

    def sampled(self, label: str, method: str = "POST") -> dict[str, int]:
        """{id of a request: tokens that weights of this label sampled} of what a paused server holds; with
        "GET", what was answered last to another process, which has loaded other weights since.

        Raises:
            ValueError: it samples on, or nobody has asked, or its lock is of an older version.
        """
        what = f"how much {label or 'its first weights'} sampled"
        return self.call(method, f"{SAMPLED}?{label}", what, dict)

    def resume(self) -> None:
        """Goes on with the requests that a pause holds."""
        self.call("POST", "/resume", "the resumption")

    def load(self, push: Push) -> None:
        """Gives a paused server the weights of `push`; it checks them first, and then says what it holds.

        Raises:
            PushRefused: it did not load them; after a wrong base or a break the next push has to be whole.
            ServerDead: it did not answer, or its engine failed: its weights are unknown.
        """
        self.tell("cohort_load", asdict(push), deed=f"load version {push.version}")
        if self.facts().has_spans:
            self.call("POST", "/update_weight_version", "its version", json={"new_version": push.content})
        if (found := self.holds()) != push.content:
            raise PushRefused(f"server {self.url} says it holds {found} after {push.content} was pushed")

    def tell(self, method: str, *arguments: Any, deed: str) -> None:
        """Asks for a step of a load.

        Raises:
            PushRefused: the server did not do it; it says why.
        """
        answers = self._rpc(method, *arguments, what=f"the answer to: {deed}")
        for told in answers:
            if (fault := told.get("refused") or told.get("broken")) is not None:
                kept = f"it goes on with {told['holds'] or 'what it held'}"
                state = kept if all("refused" in one for one in answers) else "its weights are unknown"
                raise PushRefused(f"server {self.url} did not {deed}: {fault}; {state}")

    def holds(self) -> str:
        """`Push.content` of the weights that were pushed last; empty if there are none, if a load broke off,
        or if its workers hold different ones.

        Raises:
            PushRefused: the server labels its samples differently.
        """
        holds, *others = {told["holds"] for told in self._rpc("cohort_facts")}
        holds = "" if others else holds
        if holds and self.facts().has_spans:
            label = self.call("GET", "/weight_info", "its version", itemgetter("weight_version"))
            if label != holds:
                raise PushRefused(f"server {self.url} labels its samples {label} and holds {holds}")
        return holds

    def describe(self) -> Mapping[str, HeldTensor]:
        """Every parameter under its Hugging Face name, and slices of further workers under names that say so;
        asked for once.

        Raises:
            ValueError: this process cannot compute fingerprints as the server does.
        """
        if not self._held:
            kind = self._rpc("cohort_facts")[0]["device"]
            if kind != "cpu" and not torch.cuda.is_available():
                raise ValueError(
                    f"server {self.url} computes on {kind}, but this process has no such device, so that "
                    "their fingerprints differ; train on a GPU, or serve on a CPU"
                )
            device = torch.device(kind, torch.cuda.current_device()) if kind != "cpu" else torch.device(kind)
            self._held = {
                name + of_worker(k): HeldTensor(tuple(shape), getattr(torch, dtype), device, *more)
                for k, described in enumerate(self._rpc("cohort_describe", False))
                for name, shape, dtype, *more in described
            }
        return self._held

    def fingerprints(self, version: int) -> dict[str, int]:
        """Hashes of what the server computes with, for the columns that are compared at `version`."""
        found = self._rpc("cohort_fingerprints", version, what=f"the fingerprints of version {version}")
        return {name + of_worker(k): own for k, prints in enumerate(found) for name, own in prints.items()}

    def lease(self, run: str, seconds: float = LEASE_S) -> None:
        """Takes the server for a run, renews that, or gives it back (0 seconds).

        Raises:
            ValueError: another run has it.
        """
        told = self._rpc("cohort_lease", run, seconds)[0]
        if told["holder"] != run:
            raise ValueError(
                f"server {self.url} serves {told['holder']}, which has it for {told['left']:.0f} s more if "
                "it does not ask again; wait until that run has ended, or name another server"
            )

    def close(self) -> None:
        self._client.close()

    def _rpc(self, method: str, *arguments: Any, what: str = "") -> list[Any]:
        """The answer of each worker.

        Raises:
            ValueError: the server lacks our worker extension; an unknown method would end its engine.
        """
        if method != "cohort_facts" and not self.facts().has_receiver:
            raise ValueError(
                f"server {self.url} runs without --worker-extension-cls {RECEIVER}, which weights "
                "need; start it with `cohort serve`"
            )
        body = {"method": method, "args": list(arguments)}
        one_or_more = lambda answer: [answer["results"][0], *answer["results"][1:]]  # noqa: E731
        return self.call("POST", "/collective_rpc", what or method, one_or_more, json=body)

    def call(self, method: str, path: str, what: str, read: Any = lambda found: found, **options: Any) -> Any:
        """What `read` makes of the JSON that a route answers with.

        Raises:
            ServerDead: no answer in time, one of a server that failed, or one that `read` cannot read.
            ValueError: the token is wrong, or the request.
        """
        where = f"server {self.url}: {what}"
        try:
            answer = self._client.request(method, path, **options)
        except httpx.TimeoutException as error:
            raise ServerDead(f"{where}: no answer within timeout_s={self.timeout_s:g}") from error
        except httpx.HTTPError as error:
            raise ServerDead(f"{where}: {type(error).__name__} {error}") from error
        if answer.status_code == 401:
            raise ValueError(
                f"server {self.url} rejects this token; engine.token_file (of a teacher: teacher.token_file) "
                "must be its own"
            )
        if answer.status_code != 200:
            kind = NoRoute if answer.status_code == 404 else ValueError
            kind = ServerDead if answer.status_code >= 500 else kind
            raise kind(f"{where}: {path} answered {answer.status_code} {answer.text[:300]}")
        try:
            return read(answer.json())
        except UNREAD as error:
            raise ServerDead(f"{where}: {unread(path, error, answer.text)}") from error


def _read_config(shown: Any) -> dict[str, Any]:
    config = shown["vllm_config"]
    both = config["model_config"] | config["parallel_config"]
    both["routes"] = bool((config.get("aux_output_config") or both).get(ROUTES))
    return {key: both[key] for key in CONFIG} | {"apis": both.get("_api_process_count", 1)}


Layouts = dict[int, Mapping[str, HeldTensor]]
"""What servers with that number of workers hold."""


def check_alike(control: Control, layouts: Layouts, *, proved: Collection[int], routes: bool) -> None:
    """Adds what a server holds to `layouts` if it fits the others. Its slices may differ from theirs.

    Args:
        proved: layouts whose fingerprints are known; none before the first weights.
        routes: it has to say which experts computed each token.

    Raises:
        ValueError: it has another model, or does not say its routes.
        EngineError: nobody knows what its slices have to show before the next weights are sent.
    """
    held, workers = control.describe(), control.facts().num_workers
    if routes and not control.facts().has_routes:
        raise ValueError(f"server {control.url} {LACKS_ROUTES}, and this run replays routes: start it again")
    for number, known in layouts.items():
        ours, theirs = (known, held) if number == workers else (_as_whole(known), _as_whole(held))
        if differ := sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)):
            raise ValueError(f"server {control.url} has another model: {', '.join(differ[:3])}")
    layouts.setdefault(workers, held)
    if proved and workers not in proved:
        raise EngineError(
            f"server {control.url} has {workers} worker(s), as none had when the current weights were sent; "
            "it gets the next ones"
        )


def _as_whole(held: Mapping[str, HeldTensor]) -> dict[str, HeldTensor]:
    plain = {name: one for name, one in held.items() if not name.endswith(")")}
    return {name: replace(one, sampled=False, axis=0, ranges=()) for name, one in plain.items()}


def check_held(content: str, prints: Mapping[str, int], *, version: int, expected: Mapping[str, int]) -> None:
    """Raises EngineError if a server holds other weights than those of this version."""
    if content.partition(".")[0] != str(version):
        raise EngineError(f"it holds {content or 'no weights'}, not version {version}")
    if wrong := mismatches(expected, prints):
        raise EngineError(
            f"it does not hold version {version}: the fingerprints of {len(wrong)} of {len(expected)} "
            f"tensors differ from the policy's: {', '.join(wrong[:8])}"
        )
