"""The README.md of an export: what the model is, how it was made, what it scores, and how to load it."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from recipes.evaluation.evaluations import read_evaluation
from recipes.models import BUILT_IN
from rl.model.adapter_folder import read_settings
from rl.report.safe_stream import say
from rl.store.folder import CHANGES, evaluation_log
from rl.store.manifest import digest_of
from rl.store.redact import redact, strip_controls
from rl.store.rows import read_rows

ABSOLUTE = re.compile(r"(?:(?<=file://)|(?<![\w.:/<~]))~?(?:/[\w.@+\-]+){2,}/?")
LOADING = {
    "diffusion": ("rl.diffusion.model", "load_diffusion_model", ""),
    "adapter": ("peft", "AutoPeftModelForCausalLM.from_pretrained", ""),
    "model": ("transformers", "AutoModelForCausalLM.from_pretrained", ', dtype="auto"'),
}
CARD = """---
{{ card_data }}
---

# {{ name }}
{{ {"adapter": "A LoRA adapter", "merged": "A LoRA adapter merged into its base"}[form] or "A model" }}, \
trained with Cohort for {{ manifest.step }} steps.

- Base model: {{ origin }}
- License of the base: {{ license }}{{ ": fill in" if license == "unknown" }}
- Proof of the export: {% if gap is defined -%}
every tensor was read back and equals the one that was written ({{ dtype }}); log-probs of {{ tokens }} \
fixed tokens are within {{ "%.2g" | format(gap) }} nats of what was trained
{%- if form == "merged" %} (the adapter moves them by up to {{ "%.2g" | format(adapter_moves) }}); \
before the cast every adapted tensor equals W + (alpha / r) B A within the rounding of fp32{% endif %}
{%- else %}every file has the hash that was taken when it was saved{% endif %}
- Versions in training: {% for n, v in manifest.versions.items() %}{{ n }} {{ v }}, {% endfor -%}
exported with cohort-rl {{ cohort }}
{%- if (config.rewards or {}).control | default("none", true) != "none" %}
- Control arm: rewards.control={{ config.rewards.control }}. Its rewards do not say what is right.
{%- endif %}

## Held-out results
{% for step in (0, manifest.step) -%}
- step {{ step }}: {{ heldout[step] or "no accuracy was measured" }}
{% endfor %}
{%- if measured %}
| `cohort eval` on | step | measure | % (95 % interval) | prompts | seed | temperature |
|---|---|---|---|---|---|---|
{% for row in measured %}| {{ row | join(" | ") }} |
{% endfor %}{% endif %}
## How to load it
```python
from {{ load[0] }} import {{ load[1].partition(".")[0] }}
model = {{ load[1] }}("{{ name }}"{{ load[2] }})
```

## Data
{% for key, title, data in (("data", "training", config.data), \
("evaluation data", "held-out", (config.evaluation or {}).data)) if data -%}
- {{ title }}: {{ data.source or "a share of the training data" }}, revision \
{{ data.revision or "not given" }}, rows and xxh3_128 {{ (inputs[key] or {}).rows or "unknown" }}
{% endfor -%}
- chat template: fingerprint {{ (inputs["chat template"] or {}).text or "unknown" }}

## Recipe
````yaml
{% for row in changes if row.step < manifest.step -%}
# after step {{ row.step }}: {{ row.key }} {{ row.old }} -> {{ row.new }}
{% endfor -%}
{{ recipe }}````
"""


def write_card(stage: Path, run: Path, facts: dict[str, Any], *, name: str) -> None:
    """Writes README.md from the facts of an export, without secrets; absolute paths become <local>/NAME."""
    config, named = facts["config"], facts["config"]["model"]["name"]
    form = "diffusion" if facts["masked"] else facts["form"].replace("merged", "model")
    base, revision = facts.get("base", named), facts["revision"] or config["model"].get("revision")
    origin = f"{base}, revision {revision or 'unknown: fill in'}"
    if is_local(base):
        origin = f"a local folder called {Path(base).name}: fill in where it comes from"
    header: Any = {"license": "unknown", "tags": ["cohort"], "pipeline_tag": "text-generation"}
    header |= license_of(base, revision)
    header |= {"library_name": LOADING[form][0], "base_model": None if is_local(base) else base}
    more = facts | {"name": name, "cohort": version("cohort-rl")}
    card = ModelCard.from_template(
        ModelCardData(**header),
        template_str=CARD,
        origin=f"{named} of the package {BUILT_IN[named][0]}" if named in BUILT_IN else origin,
        inputs=read_settings(run / "inputs.json"),
        heldout=evaluation_log(run).read(),
        measured=_measured(run, {facts["digest"], base_digest(run)}),
        load=LOADING[form],
        changes=read_rows(run / CHANGES),
        recipe=yaml.safe_dump(redact(config), sort_keys=False),
        **more,
    )
    text = ABSOLUTE.sub(lambda m: f"<local>/{Path(m[0]).name}", strip_controls(redact(str(card))))
    (stage / "README.md").write_text(text + "\n")


def is_local(name: str) -> bool:
    return name in BUILT_IN or name.startswith(("/", "~", ".")) or Path(name).exists()


def license_of(base: str, revision: str | None) -> dict[str, str]:
    """The license that a model's card names; empty if it names none or cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        path = Path(base, "README.md")
        if not path.parent.is_dir():
            if is_local(base):
                return {}  # a built-in name or a deleted folder: the hub is not asked
            path = hf_hub_download(base, path.name, revision=revision)
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
        return {key: str(found[key]) for key in ("license", "license_name", "license_link") if key in found}
    return {}


def base_digest(run: Path) -> str:
    """The digest that `cohort eval` computes for the weights that the run began with."""
    inputs = read_settings(run / "inputs.json")
    began = inputs.get("model")
    both = [began, inputs.get("base model") or began]
    return digest_of(both)


def _measured(run: Path, digests: set[str]) -> list[list[Any]]:
    """Rows of `cohort eval` for these very weights, and for the base that the run began with."""
    files = {*run.glob("eval.json"), *run.glob("evals/*/eval.json"), *Path().glob("evals/*/eval.json")}
    rows = []
    for file in sorted(files):
        try:
            found = read_evaluation(file)
        except ValueError as error:
            say(f"left out of the card: {error}")
            continue
        if found.get("digest") not in digests:
            continue
        more = [found["seed"], found["sampling"]["temperature"]]
        for grader, numbers in found["results"].items():
            value, low, high = (100 * numbers["avg"][end] for end in ("value", "low", "high"))
            measure = [f"avg@{found['num_samples']} by {grader}", f"{value:.1f} ({low:.1f} to {high:.1f})"]
            rows.append([found["data"], found["step"], *measure, numbers["n"], *more])
    return rows
