"""Small tasks of lm-eval."""

from __future__ import annotations

import json
from pathlib import Path

TASK = """
task: tiny_{name}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{text}"
doc_to_target: {target}
metric_list:
{metrics}
"""
LAST_WORD = """
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - name: last
    filter: [{function: regex, regex_pattern: "(w[0-9]+)", group_select: -1}, {function: take_first}]
"""


def write_lm_eval_tasks(folder: Path) -> list[dict]:
    """Tasks of lm-eval over eight local rows: tiny_choices, tiny_texts (perplexity) and tiny_samples."""
    rows = [
        {
            "prompt": f"What is w{i}",
            "choices": [f"w{i + 1} w4", f"w{i + 9}"],
            "answer": i % 2,
            "wanted": f"w{i}",
        }
        for i in range(8)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {
        "choices": ("multiple_choice", "{{prompt}}", "answer", ["acc"], "doc_to_choice: choices\n"),
        "texts": ("loglikelihood_rolling", "", '"{{prompt}}"', ["word_perplexity"], ""),
        "samples": ("generate_until", "{{prompt}}", "wanted", ["exact_match"], LAST_WORD),
    }
    for name, (kind, text, target, metrics, more) in tasks.items():
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics)
        config = TASK.format(name=name, kind=kind, file=file, text=text, target=target, metrics=listed)
        (folder / f"{name}.yaml").write_text(config + more)
    return rows
