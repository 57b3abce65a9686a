"""The code grader: completion and tests -> reward, by running the program in `rewards.sandbox`."""

# ruff: noqa: F401  these names are handed on
from rewards.code.grader import (
    CodeOptions,
    close_sandboxes,
    code_reward,
    code_sandbox,
    grade,
    grade_all,
    shared_sandbox,
)
