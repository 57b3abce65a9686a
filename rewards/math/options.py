"""The policy of the math grader."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True, slots=True)
class MathOptions:
    """The policy decisions of the math grader; `rewards.math.grader` explains them.

    Attributes:
        extraction: where to look for the answer. "any": the last box, else a stated answer, else the last
            formula or number; "stated": never the last formula or number; "boxed": only a box.
        percent: 50% equals "either" 50 or 0.5, or "hundredths" (0.5 only), or another percentage only
            ("sign").
        units: "lenient": a missing unit is not a fault, two written ones must agree (5 cm = 50 mm); "strict":
            both or neither; "ignore".
        degrees: "either": 90° is 90 and pi/2; "radians": pi/2 only.
        decimal_rtol: relative error allowed where a side is written as a decimal. The default passes float
            noise and no rounding; 0.01 accepts two digits.
        decimal_comma: read 1,22 as 1.22 where it cannot be a list of the gold's kind.
        ordered_lists: 1, 2 and 2, 1 differ. Tuples are always ordered, sets never.
        loose_shapes: accept other notations of the same values: (1, 2) for 1, 2 or for a column; {3} for 3;
            1/2 for 1:2.
        chains: of a = b = c, "consistent" takes c if the numbers in the chain agree, "last" takes c.
        evaluated: the answer must be worked out: for 84, 58 + 26 is wrong, and 58 + 26 = 84 is right. This
            does not apply to a gold that contains an operation.
        symbolic_timeout_s: seconds that sympy may work on what the grammar does not cover; 0: never.
        max_chars: a longer prediction is too complex, unless it repeats the gold.
    """

    extraction: Literal["any", "stated", "boxed"] = "any"
    percent: Literal["either", "hundredths", "sign"] = "either"
    units: Literal["lenient", "strict", "ignore"] = "lenient"
    degrees: Literal["either", "radians"] = "either"
    decimal_rtol: float = 1e-14
    decimal_comma: bool = True
    ordered_lists: bool = False
    loose_shapes: bool = True
    chains: Literal["consistent", "last"] = "consistent"
    evaluated: bool = False
    symbolic_timeout_s: float = 0.7
    max_chars: int = 4_000

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(MathOptions).items():
            choices, value = get_args(hint), getattr(self, name)
            if choices and value not in choices:
                raise ValueError(f"{name}={value!r} is not a policy of the math grader; use one of {choices}")
        if not 0 <= self.decimal_rtol < 1:
            raise ValueError(
                f"decimal_rtol={self.decimal_rtol} is not in [0, 1); use 1e-14 for float noise only"
            )
        if self.symbolic_timeout_s < 0 or self.max_chars < 1:
            raise ValueError("symbolic_timeout_s and max_chars must be positive; use 0.7 and 4000")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MathOptions:
        """The options that a mapping, such as a config's, names. Raises ValueError for an unknown name."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
                raise ValueError(f"math_options has no {name!r}; {hint}")
        return cls(**values)
