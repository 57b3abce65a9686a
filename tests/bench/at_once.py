"""What training while others still sample costs both sides on one GPU, and what workload W would save by it.

    python -m tests.bench.at_once [--shape 1.5b] [--only slices,mps,streams,green] [--limit-s 150]

One side decodes `--sizes` completions steadily, the other passes micro-batches of W's lengths forward and
backward. Each is measured alone and then at once, over the time in which both work, by means: the driver's
slices of time are not even. Per option a fresh process, whose failure is one line:
- slices: both sides have a process of their own, and the driver lets them take turns;
- mps: the same under CUDA's multi-process service, which this program starts in a folder of its own, without
  touching the card's settings, and stops; also with a share of the multiprocessors for the trainer;
- streams: one process and two threads, the engine's stream and its graphs have a high priority; also with the
  trainer in a green context of as many multiprocessors;
- green: as that, and the engine in a green context of the rest.
A trainer's micro-batch has `--budget` tokens. `saved` is by `tests.bench.tail`, with the decode steps'
slowdown and the trainer's speed per token against micro-batches of `--full-budget` tokens alone. It is the
share of sample + train that W saves if it works at once where that pays.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from rl.batch import pack
from rl.types import Prompt, SamplingParams
from rl.update import pack_rules
from tests.bench.launch import run_within
from tests.bench.tail import Sharing, saved_at_once
from tests.bench.train_phase import draw_groups, training_config, training_step
from tests.bench.workload import Workload, write_model
from tests.calling import call
from tests.vllm_engines import start_vllm

MIN_START_S = 35  # with less left, another option is not begun
WARM_STEPS = 20
LONGEST = 3000  # tokens of a completion: none ends while it is measured
PRIORITY = -5
DEVICE = "AT_ONCE_DEVICE"  # what every process of this program must find
KV_CACHE_BYTES = 4 << 30  # of 32 completions of LONGEST tokens
HELD: dict[str, Any] = {}
"""What this process holds: the engine, the policy and its micro-batches by budget, makers of green
streams."""

Spans = list[tuple[float, float, int]]
"""Start and end of each decode step or micro-batch by the machine's one clock, and its tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--only", default="slices,mps,streams,green")
    parser.add_argument("--sizes", default="32,8", help="running completions, multiples of 8")
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--full-budget", type=int, default=12288)
    parser.add_argument("--trainer-sms", type=float, default=0.75, help="share of the multiprocessors")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a measurement")
    parser.add_argument("--option-s", type=float, default=100.0, help="the longest that an option may take")
    parser.add_argument("--limit-s", type=float, default=150.0, help="all of them together")
    parser.add_argument("--measure", choices=list(OPTIONS), help="in this process")
    parser.add_argument("--folder", type=Path, help="of model and results; for this program's own processes")
    arguments = parser.parse_args()
    if arguments.measure:
        Measurement(arguments).run(OPTIONS[arguments.measure])
        return
    until = time.monotonic() + arguments.limit_s
    with tempfile.TemporaryDirectory(prefix="once") as scratch:
        arguments.folder = Path(scratch)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:  # no context stays here
            other.submit(write_model, arguments.folder / "model", Workload(shape=arguments.shape)).result()
            os.environ[DEVICE] = other.submit(device).result()
        for name in arguments.only.split(","):
            if name not in OPTIONS:
                sys.exit(f"--only={name}: choose from {', '.join(OPTIONS)}")
            left = until - time.monotonic()
            if left < MIN_START_S:
                print(f"{name}: not run, {left:.0f} s are left of --limit-s", flush=True)
                continue
            with service(Path(scratch)) if name == "mps" else nullcontext() as fault:
                print(fault or measured(name, arguments, min(left, arguments.option_s)), flush=True)


def measured(name: str, arguments: argparse.Namespace, limit_s: float) -> str:
    """Measures an option in a process of its own, prints its rows; returns how it ended, in one line."""
    began, log = time.monotonic(), arguments.folder / f"{name}.log"
    words = [*sys.argv[1:], "--measure", name, "--folder", str(arguments.folder)]
    code = run_within(limit_s, [sys.executable, "-m", "tests.bench.at_once", *words], log)
    results = arguments.folder / f"{name}.jsonl"
    for line in results.read_text().splitlines() if results.exists() else ():
        print(f"{name:8s}{shown(json.loads(line), arguments)}", flush=True)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    fault = f"not done within {limit_s:.0f} s" if code == 124 else f"code {code}"
    ended = "done" if code == 0 else f"failed: {fault}: {' | '.join(lines[-2:])[-500:]}"
    return f"{name}: {ended} after {time.monotonic() - began:.0f} s"


def shown(row: dict[str, Any], arguments: argparse.Namespace) -> str:
    if "fault" in row:
        return f"{row['what']}: {row['fault']}"
    cells = [f"{row['what']:<34}"]
    for size, (alone, ms, _) in row["sizes"].items():
        cells.append(f"decode {size}: {alone:.2f} -> {ms:.2f} ms ({ms / alone:.2f}x)")
    full, small = row["full"], row["alone"]
    cells.append(f"train, us a token: {full:.2f} full, {small:.2f} alone")
    cells += [f"{us:.2f} ({us / small:.2f}x) at {size}" for size, (_, _, us) in row["sizes"].items()]
    points = sorted((int(size), ms / alone, full / us) for size, (alone, ms, us) in row["sizes"].items())
    sharing = Sharing(*zip(*points, strict=True))
    saved = saved_at_once(sharing, train_s=row["full"] * row["tokens"] / 1e6, token_budget=arguments.budget)
    return "  ".join([*cells, f"saved {saved:.1%}"])


@contextmanager
def service(scratch: Path) -> Iterator[str | None]:
    """CUDA's multi-process service for this program's children; yields why there is none."""
    command = shutil.which("nvidia-cuda-mps-control")
    if command is None:
        yield "mps: not run, nvidia-cuda-mps-control is not installed"
        return
    places = {"CUDA_MPS_PIPE_DIRECTORY": scratch / "pipe", "CUDA_MPS_LOG_DIRECTORY": scratch / "mps"}
    for place in places.values():
        place.mkdir()

    def ask(what: str) -> str:
        with suppress(subprocess.TimeoutExpired):
            told = subprocess.run([command], input=what, text=True, capture_output=True, timeout=10)
            return told.stdout.strip() or told.stderr.strip()
        return "no answer within 10 s"

    with variables(**{name: str(place) for name, place in places.items()}):
        log = (scratch / "mps" / "own.log").open("w")
        daemon = psutil.Popen([command, "-f"], stdout=log, stderr=subprocess.STDOUT)
        try:
            time.sleep(1.0)
            ended = daemon.poll() is not None
            said = Path(log.name).read_text().strip()[-300:]
            yield f"mps: not run, its daemon ended at once: {said}" if ended else None
            if not ended:
                print(f"mps: servers {ask('get_server_list') or 'none, nobody used it'}", flush=True)
        finally:
            below = daemon.children(recursive=True) if daemon.is_running() else []
            ask("quit -t 5")
            _, alive = psutil.wait_procs([daemon, *below], timeout=10)
            for process in alive:
                process.kill()
            log.close()


@contextmanager
def variables(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Here(Executor):
    """Does in this thread, at once, what is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Measurement:
    """One option: starts the sides, measures them alone, then at once in one or several ways."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.workload = arguments, Workload(shape=arguments.shape)
        self.workload.export()
        self.model = arguments.folder / "model"
        self.sizes = [int(size) for size in arguments.sizes.split(",")]
        self.budgets = [arguments.budget, arguments.full_budget]
        self.sampler: Executor = Here()
        self.alone: dict[Any, float] = {}

    def run(self, option: Callable[[Measurement], None]) -> None:
        try:
            option(self)
        finally:
            self.sampler.submit(close_engine).result()

    def slices(self) -> None:
        self.sampler, trainer = other_process(), other_process()
        starting = self.sampler.submit(start_sampler, self.model, self.sizes)
        self.start_trainer(trainer)
        starting.result()
        self.measure_alone(trainer)
        self.at_once(trainer, "two processes")

    def mps(self) -> None:
        self.slices()
        self.stop_trainer()
        share = str(round(100 * self.arguments.trainer_sms))
        for more, what in (
            ({"CUDA_MPS_CLIENT_PRIORITY": "1"}, "trainer of low priority"),
            ({"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": share}, f"trainer with {share} % of the processors"),
        ):
            with variables(**more):
                trainer = other_process()
                self.start_trainer(trainer)
            self.at_once(trainer, what)
            self.stop_trainer()

    def streams(self) -> None:
        trainer = self.in_threads(lambda: {"priority": PRIORITY})
        self.at_once(trainer, "engine of high priority")
        try:
            count = trainer.submit(split_card, self.arguments.trainer_sms).result()
            self.at_once(trainer, f"and trainer on {count} processors", green=True)
        except Exception as error:
            self.note({"what": "green context", "fault": f"not measured, {type(error).__name__}: {error}"})

    def green(self) -> None:
        count = split_card(self.arguments.trainer_sms)
        trainer = self.in_threads(lambda: {"stream_ptr": HELD["green"][1](PRIORITY)})
        self.at_once(trainer, f"trainer on {count} processors, engine on the rest", green=True)

    def in_threads(self, choose: Callable[[], dict[str, int]]) -> Executor:
        """A trainer in a second thread, then the engine in this one, on streams as chosen."""
        sys.setswitchinterval(5e-4)  # Python's default lets a thread wait 5 ms for the other's
        trainer = ThreadPoolExecutor(1)
        self.start_trainer(trainer)
        with chosen_streams(choose):
            HELD["stream"] = torch.cuda.Stream() if device() == "cuda" else None
            start_sampler(self.model, self.sizes)
        self.measure_alone(trainer)
        return trainer

    def start_trainer(self, trainer: Executor) -> None:
        self.trainer = trainer
        self.tokens = trainer.submit(start_trainer, self.model, self.budgets).result()

    def stop_trainer(self) -> None:
        self.trainer.shutdown()

    def measure_alone(self, trainer: Executor) -> None:
        for size in self.sizes:
            self.alone[size] = rate(
                self.sampler.submit(decode, size, time.monotonic() + self.arguments.seconds).result()
            )
        for kind, budget in zip(("alone", "full"), self.budgets, strict=True):
            until = time.monotonic() + self.arguments.seconds
            self.alone[kind] = rate(trainer.submit(train, budget, until).result())

    def at_once(self, trainer: Executor, what: str, *, green: bool = False) -> None:
        found = {}
        for size in self.sizes:
            until = time.monotonic() + self.arguments.seconds + 0.5
            training = trainer.submit(train, self.budgets[0], until, green)
            steps = self.sampler.submit(decode, size, until).result()
            passes = training.result()
            begin, end = max(steps[0][0], passes[0][0]), min(steps[-1][1], passes[-1][1])
            both = [[s for s in spans if begin <= s[0] and s[1] <= end] for spans in (steps, passes)]
            if not all(both):
                raise RuntimeError(f"{what}, {size} running: the sides never worked at once; raise --seconds")
            found[size] = (1e3 * self.alone[size] * size, 1e3 * rate(both[0]) * size, 1e6 * rate(both[1]))
        per_token = {kind: 1e6 * self.alone[kind] for kind in ("alone", "full")}
        self.note({"what": what, "sizes": found, "tokens": self.tokens, **per_token})

    def note(self, row: dict[str, Any]) -> None:
        with (self.arguments.folder / f"{self.arguments.measure}.jsonl").open("a") as results:
            results.write(json.dumps(row) + "\n")


OPTIONS = {
    "slices": Measurement.slices,
    "mps": Measurement.mps,
    "streams": Measurement.streams,
    "green": Measurement.green,
}


def other_process() -> Executor:
    """It starts with the first submission, in the environment of that moment."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device() -> None:
    if device() != os.environ[DEVICE]:
        raise RuntimeError(f"this process finds no {os.environ[DEVICE]} device; its service refuses it")


def rate(spans: Spans) -> float:
    """Seconds a token, from the first start to the last end."""
    return (spans[-1][1] - spans[0][0]) / sum(tokens for _, _, tokens in spans)


def start_sampler(model: Path, sizes: list[int]) -> None:
    from transformers import PreTrainedTokenizerFast

    from rollout.vllm import local

    check_device()
    plain = local.engine_arguments
    # With a cache of given size vLLM does not measure memory, which the trainer takes at the same time.
    local.engine_arguments = lambda settings: plain(settings) | {"kv_cache_memory_bytes": KV_CACHE_BYTES}
    with on_stream(HELD.get("stream")):
        HELD["engine"] = start_vllm(
            model,
            PreTrainedTokenizerFast.from_pretrained(model),
            dtype=torch.bfloat16 if device() == "cuda" else torch.float32,
            max_model_len=200 + LONGEST,
            process="inside",
            max_num_seqs=max(sizes),
            gpu_memory_utilization=0.2,
            timeout_s=600.0,
        )
    decode(sizes[0], time.monotonic() + 0.5)


def close_engine() -> None:
    if (engine := HELD.pop("engine", None)) is not None:
        engine.close()


def decode(size: int, until: float) -> Spans:
    """Steps of `size` running completions until the clock says `until`, after some that do not count."""
    engine, draw, workload = HELD["engine"], random.Random(size), Workload.current()
    group, stops = min(8, size), len(workload.stop_ids)
    length = range(workload.prompt_length)
    ids = [tuple(draw.randrange(stops, workload.vocabulary) for _ in length) for _ in range(size // group)]
    prompts = [Prompt(f"{size}-{until}-{i}", "", row) for i, row in enumerate(ids)]
    how = {"sampling": SamplingParams(LONGEST), "seeds": list(range(len(ids))), "with_logprobs": False}
    spans: Spans = []
    with on_stream(HELD.get("stream")):
        engine.submit(call(prompts, num_completions=group, **how))
        requests = engine._core._client.engine_core.scheduler.requests
        taken = 0
        while requests and (time.monotonic() < until or not spans):
            began = time.monotonic()
            engine._advance(began, "a step")
            taken += 1
            if taken > WARM_STEPS:
                spans.append((began, time.monotonic(), size))
        engine.abort(prompts)
        while requests:
            engine._advance(time.monotonic(), "a step")
    return spans


def start_trainer(model: Path, budgets: list[int]) -> int:
    """Makes policy and micro-batches, and passes some; returns the tokens of a step of W."""
    check_device()
    workload = Workload.current()
    groups = draw_groups(workload)
    advantages = [[r.score - 0.5 for r in g.rewards] for g in groups]  # type: ignore[operator]
    overrides = ["model.keep_logits=true"]
    policy, _, _ = training_step(training_config(model, overrides), groups)
    HELD["policy"], HELD["micro_batches"] = policy, {}
    for budget in budgets:
        rules = pack_rules(training_config(model, [*overrides, f"train.token_budget={budget}"]))
        (batch,) = pack(groups, advantages, rules)
        HELD["micro_batches"][budget] = policy.prepare(batch, draw=0)
        train(budget, time.monotonic() + 0.5)
    return sum(len(p.batch.token_ids_N) for p in HELD["micro_batches"][budgets[1]])


def train(budget: int, until: float, green: bool = False) -> Spans:
    """Forward and backward passes until the clock says `until`; one is always submitted ahead."""
    if green and "trainer stream" not in HELD:
        HELD["trainer stream"] = torch.cuda.ExternalStream(HELD["green"][0](0))
    policy, micro_batches = HELD["policy"], HELD["micro_batches"][budget]
    spans: Spans = []
    ahead: list[tuple[Callable[[], None], int]] = []
    began, number = time.monotonic(), 0

    def wait() -> None:
        nonlocal began
        finished, tokens = ahead.pop(0)
        finished()
        spans.append((began, time.monotonic(), tokens))
        began = spans[-1][1]

    with on_stream(HELD["trainer stream"] if green else None):
        while time.monotonic() < until or not spans:
            prepared = micro_batches[number % len(micro_batches)]
            number += 1
            batch, scores = prepared.batch, policy.score(prepared)
            policy.backward(-(scores.logprobs_L * batch.advantages_L * batch.weights_L).sum(), last=False)
            ahead.append((marked(), len(batch.token_ids_N)))
            if len(ahead) > 1:
                wait()
        while ahead:
            wait()
    return spans


def marked() -> Callable[[], None]:
    """A wait for what was submitted so far, by this thread and not by others."""
    if device() == "cpu":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@contextmanager
def chosen_streams(choose: Callable[[], dict[str, int]]) -> Iterator[None]:
    """New streams of torch are as chosen: vLLM captures its graphs on one of its own, and a graph's kernels
    keep the priority and the context of the stream that they were captured on.
    """
    plain = torch.cuda.Stream.__new__

    def new(cls: Any, device: Any = None, priority: int = 0, **more: Any) -> Any:
        return plain(cls, device, priority, **more) if more else plain(cls, device, **choose())

    torch.cuda.Stream.__new__ = new
    try:
        yield
    finally:
        torch.cuda.Stream.__new__ = plain


def split_card(share: float) -> int:
    """Makes two green contexts, of a share of the multiprocessors and of the rest; returns the first number.

    Raises:
        ImportError, RuntimeError: cuda-python or the driver does not offer them.
    """
    from cuda.bindings import driver  # pyright: ignore

    def ok(answer: Any) -> Any:
        code, *values = answer
        if code.value:
            raise RuntimeError(f"the driver answers {code.name}")
        return values[0] if len(values) == 1 else values

    torch.zeros(1, device="cuda")  # makes the primary context
    device = ok(driver.cuDeviceGet(torch.cuda.current_device()))
    whole = ok(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    most = round(share * whole.sm.smCount / 8) * 8
    parts, _, rest = ok(driver.cuDevSmResourceSplitByCount(1, whole, 0, most))

    def maker(part: Any) -> Callable[[int], int]:
        described = ok(driver.cuDevResourceGenerateDesc([part], 1))
        default = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = ok(driver.cuGreenCtxCreate(described, device, default))
        apart = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return lambda priority: int(ok(driver.cuGreenCtxStreamCreate(context, apart, priority)))

    HELD["green"] = [maker(parts[0]), maker(rest)]
    return parts[0].sm.smCount


if __name__ == "__main__":
    main()
