"""The boxed-math grader: completion and gold answer -> reward. `rewards.math.grader` has the rules."""

from rewards.math.grader import DEFAULTS, MathOptions, grade, math_reward

__all__ = ["DEFAULTS", "MathOptions", "grade", "math_reward"]
