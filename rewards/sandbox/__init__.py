"""Runs untrusted programs: a warm process per core forks a confined child for each program."""

# ruff: noqa: F401  these names are handed on
from rewards.sandbox.reaper import own_seconds
from rewards.sandbox.sandbox import Command, Limits, Program, RunResult, Sandbox, SandboxError
