"""Which mixtures of experts vLLM serves with weights that a trainer sends, by transformers' `model_type`.

`tests/rollout/test_served_families.py` starts each of them. It compares log-probs with transformers' after
two syncs (fp32, 1e-4 nats), or checks the refusal. A family in neither dict is tried: names, fingerprints and
the canary decide.
"""

from __future__ import annotations

import json
from typing import Any

SERVED = (
    *("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe", "granitemoeshared", "glm4_moe"),
    "exaone_moe",
)
_MLA = "vLLM's rotary kernel on a CPU takes heads of latent attention for tokens (0.3 nats on average)"
_STATE = "vLLM on a CPU starts no model with recurrent layers without cutting prompts in two"
REFUSED_ON_CPU = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _MLA),
    **dict.fromkeys(("qwen3_next", "lfm2_moe"), _STATE),
}
REFUSED = {
    "gpt_oss": "vLLM's reload leaves the sinks of attention, the experts and their biases as they were",
    "ernie4_5_moe": "vLLM names the selection bias differently and keeps a head where transformers ties it",
}
ROUTED_AS = {"deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}
"""Keys of config.json without which vLLM routes by softmax, without bias; transformers writes neither."""
ROWS_ON_CPU = 32
"""vLLM on a CPU pads experts to a multiple of this number of rows; its reload does not."""


def refusal(config: Any, expert_rows: int | None, *, on_cpu: bool) -> str | None:
    """Why vLLM cannot be sent the weights of a model with this config of transformers, or None.

    Args:
        expert_rows: intermediate size of a routed expert; None: there are none.
    """
    name = str(config.model_type)
    if (reason := REFUSED.get(name) or (REFUSED_ON_CPU.get(name) if on_cpu else None)) is not None:
        return f"{name}: {reason}"
    if lacking := {k: v for k, v in ROUTED_AS.get(name, {}).items() if not hasattr(config, k)}:
        return f"{name}: vLLM would route unlike transformers; add {json.dumps(lacking)} to config.json"
    if on_cpu and expert_rows is not None and expert_rows % ROWS_ON_CPU:
        return (
            f"{name}: experts have {expert_rows} rows, and vLLM on a CPU takes new weights only of "
            f"multiples of {ROWS_ON_CPU}"
        )
    return None
