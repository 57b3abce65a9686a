"""The boxed-math grader: completion and gold answer -> reward. `grader` says what is right."""

from rewards.math.grader import DEFAULTS, MathOptions, grade, math_reward

__all__ = ["DEFAULTS", "MathOptions", "grade", "math_reward"]
