"""Runs untrusted programs: a warm process per core forks a confined child for each."""

from rewards.sandbox.sandbox import Command, Limits, Program, RunResult, Sandbox, SandboxError

__all__ = ["Command", "Limits", "Program", "RunResult", "Sandbox", "SandboxError"]
