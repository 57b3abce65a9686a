"""Every number in recipes/*.md that needs a GPU: the jobs of gpu_jobs.yaml, one at a time on each GPU.

    python -m tests.bench.on_gpu --data DATA --write-data GSM8K_FOLDER   # once; needs reasoning-gym
    python -m tests.bench.on_gpu --data DATA --out FOLDER [--only NAME,NAME] [--at-once 1]

A job starts when those that it needs have ended well. Its output goes to FOLDER/NAME.log; FOLDER/summary.txt
holds seconds and exit codes. A job that has ended well in FOLDER is not run again; one that passes its limit
is killed with its children, and the others go on. The exit status is 1 if a job did not end well or could
not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

JOBS = Path(__file__).with_name("gpu_jobs.yaml")
KEYS = ("prompt", "completion", "answer")


@dataclass(frozen=True)
class Job:
    name: str
    limit_s: float
    run: str
    needs: tuple[str, ...] = ()

    def words(self, data: Path, out: Path) -> list[str]:
        """Module and arguments. A folder's name stays one word, whatever is in it."""
        places = {"data": data, "out": out, "here": out / self.name}
        return [word.format_map(places) for word in shlex.split(self.run)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--write-data", type=Path, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--only", help="names, in this order; what they need must be done")
    parser.add_argument("--at-once", type=int, default=1, help="on each GPU; seconds then count others' work")
    arguments = parser.parse_args()
    if arguments.write_data:
        write_data(arguments.data, arguments.write_data)
        return 0
    if arguments.at_once < 1:
        parser.error(f"--at-once {arguments.at_once} runs nothing; use 1 or more")
    jobs = [Job(**row) for row in yaml.safe_load(JOBS.read_text())]
    if arguments.only:
        by_name, names = {job.name: job for job in jobs}, list(dict.fromkeys(arguments.only.split(",")))
        if unknown := [name for name in names if name not in by_name]:
            parser.error(
                f"--only: no job is named {', '.join(map(repr, unknown))}; there are {', '.join(by_name)}"
            )
        jobs = [by_name[name] for name in names]
    failed = Jobs(jobs, arguments.out.absolute(), arguments.data.absolute()).work(
        [gpu for gpu in visible_gpus() for _ in range(arguments.at_once)]
    )
    return 1 if failed else 0


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, one of them for each job; "0" on a machine without any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = map(str, range(max(1, torch.cuda.device_count())))
    return [gpu.strip() for gpu in named.split(",")] if named else list(numbers)


def write_data(folder: Path, gsm8k: Path) -> None:
    """The prompts as files, for a machine without a hub and without reasoning-gym."""
    from recipes.tasks.few_shot import boxed_chain_sum, solved_chain_sum
    from recipes.tasks.gsm8k import split_solution

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / f"gsm8k_{split}.jsonl").write_bytes((gsm8k / f"gsm8k_{split}.jsonl").read_bytes())
    asked = [json.loads(line) for line in (folder / "gsm8k_test.jsonl").read_text().splitlines()[:256]]
    questions = [{"prompt": r["question"], "answer": split_solution(r["answer"])[1]} for r in asked]
    _write(folder / "gsm8k_questions.jsonl", questions)
    _write(folder / "sums_solved.jsonl", solved_chain_sum(size=20000, seed=7, num_examples=0))
    _write(folder / "sums.jsonl", boxed_chain_sum(size=4000, seed=1, num_examples=0))
    _write(folder / "sums_heldout.jsonl", boxed_chain_sum(size=400, seed=4242, num_examples=0))


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    kept = [{key: row[key] for key in KEYS if key in row} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))


class Jobs:
    """The jobs that are left, and threads, each for a GPU, that take the first whose needs are met."""

    def __init__(self, jobs: list[Job], out: Path, data: Path) -> None:
        self.out, self.data = out, data
        out.mkdir(parents=True, exist_ok=True)
        self.done = {file.stem for file in out.glob("*.done")}
        self.left = [job for job in jobs if job.name not in self.done]
        self.running: set[str] = set()
        self.failed: list[str] = []
        self.changed = threading.Condition()

    def work(self, gpus: list[str]) -> list[str]:
        """Names of the jobs that did not end well or could not be run."""
        threads = [threading.Thread(target=self._on_gpu, args=(gpu,)) for gpu in gpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in self.left:
            missing = [name for name in job.needs if name not in self.done]
            self._say(f"{job.name} was not run: it needs {', '.join(missing) or 'a GPU whose thread lives'}")
        return self.failed + [job.name for job in self.left]

    def _on_gpu(self, gpu: str) -> None:
        while (job := self._next()) is not None:
            began, code = time.monotonic(), "a fault of this program"
            try:
                self._say(f"{job.name} starts on GPU {gpu}")
                code = self._run(job, gpu)
                if code == 0:
                    (self.out / f"{job.name}.done").touch()
            except Exception as error:  # of one job; the others may go well
                code = f"{type(error).__name__} ({error})"
            finally:
                with self.changed:  # whatever happens, no other thread waits for this job
                    self.running.remove(job.name)
                    if code == 0:
                        self.done.add(job.name)
                    else:
                        self.failed.append(job.name)
                    self.changed.notify_all()
            self._say(f"{job.name} ended with {code} after {time.monotonic() - began:.0f} s")

    def _next(self) -> Job | None:
        """The first job whose needs are met; None when no running job can make another one possible."""
        with self.changed:
            while self.left:
                job = next((job for job in self.left if self.done.issuperset(job.needs)), None)
                if job is not None:
                    self.left.remove(job)
                    self.running.add(job.name)
                    return job
                if not self.running:
                    return None
                self.changed.wait()  # every running job has a limit
            return None

    def _run(self, job: Job, gpu: str) -> int | str:
        with (self.out / f"{job.name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *job.words(self.data, self.out)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            try:
                return process.wait(timeout=job.limit_s)
            except subprocess.TimeoutExpired:
                return f"its limit, {job.limit_s:g} s,"
            finally:
                self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the job and its children, which may take a SIGTERM for "save first"."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for _ in range(100):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    return
                number = 0  # looks whether there is somebody left
                process.poll()
                time.sleep(0.2)

    def _say(self, line: str) -> None:
        with (self.out / "summary.txt").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
