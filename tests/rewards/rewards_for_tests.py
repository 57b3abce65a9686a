"""Reward functions that the tests name by import path: well-behaved ones and every way to fail."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time

from rewards.completion import completion_text
from rewards.plugins import groupwise, ignores_answer, per_completion
from rl.types import Reason, Reward

FAULTS = {
    "hang": lambda: time.sleep(1000),
    "spin": lambda: _spin(),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(0),
    "leave": lambda: sys.exit(0),
    "hog": lambda: [bytearray(1 << 20) for _ in range(1 << 20)],
    "raise": lambda: {}["answer"],
    "nan": lambda: [float("nan")],
    "inf": lambda: [float("inf")],
    "huge": lambda: [10**400],
    "text": lambda: ["1.0"],
    "long": lambda: [1.0, 1.0],
    "empty": lambda: [],
    "scalar": lambda: 1.0,
    "nothing": lambda: None,
    "dict": lambda: {"score": 1.0},
    "array": lambda: [[1.0]],
    "close": lambda: os.closerange(3, 200),
}


def _spin():
    while True:
        pass


@per_completion
def length(completions, **columns):
    """The number of characters; a completion that names a fault has it."""
    text = completions[0]
    return FAULTS[text]() if text in FAULTS else [float(len(text))]


@per_completion
def nap(completions):
    """Sleeps as many seconds as "nap 0.2" says, or until two calls of its pair have begun, as "pair 3 FOLDER"
    says, or has a fault; counts its calls.
    """
    text = completions[0]
    NAPS.append(text)
    if text.startswith("nap"):
        time.sleep(float(text.split()[1]))
    if text.startswith("pair"):
        _, number, folder = text.split()
        open(f"{folder}/{number}", "w").close()
        while len(os.listdir(folder)) < 2 * (int(number) // 2 + 1):
            time.sleep(0.01)
    return FAULTS[text]() if text in FAULTS else [float(len(NAPS))]


NAPS = []


@per_completion
def patient(completions):
    """Naps, by a deadline of its own."""
    return nap(completions)


patient.time_limit_s = 3.0  # pyright: ignore[reportFunctionMemberAccess]


def ids(completion_ids):
    return [float(sum(token_ids)) for token_ids in completion_ids]


def exact(completions, answer, bonus=0.0, **columns):
    return [float(c == a) + bonus for c, a in zip(completions, answer, strict=True)]


def rich(prompts, completions, answer):
    return [Reward(1.0, Reason.CORRECT, "as it should be", extracted=c) for c in completions]


def unusable_gold(completions):
    return [Reward(None, Reason.BAD_GOLD, "no such answer") for _ in completions]


def broken_sandbox(completions):
    return [Reward(None, Reason.INFRA_ERROR, "no sandbox") for _ in completions]


def half(completions):
    """Applies to completions that start with "a" only."""
    return [1.0 if c.startswith("a") else None for c in completions]


@groupwise
def centred(completions):
    """Length minus the mean length of all completions that came in one call."""
    mean = sum(map(len, completions)) / len(completions)
    return [len(c) - mean for c in completions]


@groupwise
def group_fault(completions):
    return FAULTS[completions[0]]() if completions[0] in FAULTS else [1.0] * len(completions)


def batch_size(completions):
    return [float(len(completions))] * len(completions)


def size_of_call(completions, **columns):
    return batch_size(completions)


MET = []


@per_completion
async def judge(completions):
    """Waits as for a network. "meet" waits until three calls of its kind are in flight."""
    if completions[0] == "hang":
        await asyncio.sleep(1000)
    if completions[0] == "block":
        time.sleep(1000)
    MET.append(completions[0])
    while completions[0] == "meet" and MET.count("meet") < 3:
        await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]


@per_completion
def pid(completions):
    return [float(os.getpid()) for _ in completions]


@per_completion
def parent_and_child(completions):
    """Leaves a child behind, then hangs: the child is in the grader's session and must go with it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(completions[0], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(1000)


@per_completion
def once(completions):
    """Is killed as by kill -9 the first time that it sees a path, then scores 1."""
    path = completions[0]
    if path.startswith("/") and not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0]


@per_completion
def noisy(completions):
    print("x" * 100_000)
    sys.stderr.write("y" * 100_000)
    return [1.0]


@per_completion
def environment(completions):
    return [float(signal.getsignal(signal.SIGINT) is signal.SIG_IGN) + 2 * float("torch" in sys.modules)]


def make_scaled(factor: float, offset: float = 0.0):
    """A factory: takes no completions, returns the reward."""

    def scaled(completions):
        return [len(c) * factor + offset for c in completions]

    return scaled


class Scaled:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, completions, **columns):
        return [len(c) * self.factor for c in completions]


def makes_nothing(factor: float = 1.0):
    return factor


def trl_extras(completions, log_extra, log_metric, trainer_state, **columns):
    log_extra("column", list(completions))
    log_metric("metric", 1.0)
    return [float(trainer_state is None)] * len(completions)


not_callable = 3


def verified(completions, answer):
    """Math-Verify, which is not symmetric, called the right way round; an unusable gold abstains."""
    return [_verify(gold, completion) for gold, completion in zip(answer, completions, strict=True)]


def verified_swapped(completions, answer):
    return [_verify(completion, gold) for gold, completion in zip(answer, completions, strict=True)]


def _verify(gold, completion):
    from math_verify import parse, verify

    parsed = parse(gold)
    return float(verify(parsed, parse(completion))) if parsed else None


def generous(completions, answer):
    return [1.0] * len(completions)


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """As verl calls it."""
    right = solution_str == ground_truth and data_source == "mine"
    return {"score": float(right), "length": len(solution_str)} if extra_info else float(right)


def reward_func(queries, prompts, labels):
    """As OpenRLHF calls it."""
    import torch

    return {
        "rewards": torch.tensor([float(q == p + a) for q, p, a in zip(queries, prompts, labels, strict=True)])
    }


def reward_fn(prompt, completions, prompt_ids, completion_ids, answer, **kwargs):
    """As AReaL calls it."""
    return float(completions == answer) + len(completion_ids) / 100


def exact_text(completions, answer):
    """1 if the text is the answer; completions may be chats."""
    return [float(completion_text(c) == a) for c, a in zip(completions, answer, strict=True)]


@ignores_answer
def blind(completions, answer):
    return [0.5] * len(completions)


def prints(completions, **columns):
    for completion in completions:
        print("saw", completion.strip(), "\x1b[31m")
    return [0.0] * len(completions)
