"""The list of GPU benchmarks can be read, and its modules and configs exist."""

from __future__ import annotations

import importlib.util
import shlex

import yaml

from rl.config_file import load_config
from tests.bench.on_gpu import JOBS, Job


def test_every_job_can_be_started(tmp_path):
    names: set[str] = set()
    for row in yaml.safe_load(JOBS.read_text()):
        job = Job(**row)
        assert job.name not in names and names.issuperset(job.needs)
        names.add(job.name)
        module, *arguments = shlex.split(job.run.format(data=tmp_path, out=tmp_path, here=tmp_path / "here"))
        assert importlib.util.find_spec(module) is not None, job.name
        if module == "recipes.grpo":
            load_config(arguments[0], arguments[1:])
