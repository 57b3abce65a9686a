"""The code grader: completion and tests -> reward, by running the program in `rewards.sandbox`."""

from rewards.code.grader import (
    CodeOptions,
    close_sandboxes,
    code_reward,
    code_sandbox,
    grade,
    grade_all,
    shared_sandbox,
)

__all__ = [
    "CodeOptions",
    "close_sandboxes",
    "code_reward",
    "code_sandbox",
    "grade",
    "grade_all",
    "shared_sandbox",
]
