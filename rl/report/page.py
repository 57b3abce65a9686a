"""A page from a template, the style and the scripts of this folder, in one file.

Everything shown may be hostile. Templates escape it, and data is JSON that cannot end its element. The page's
policy allows one script by its hash and no request, and that script only ever sets text. A report's script
may load others, its side files, which hold only one call with text in base64.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rl.store.durable import written_whole

_FOLDER = Path(__file__).parent


def write_page(path: Path, template: str, values: Mapping[str, Any], *, data: Mapping[str, str]) -> None:
    """Renders a template to a file, whole or not at all.

    Args:
        data: id of an element -> JSON in it, by `json_for_html`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_hash"] = _script_hash
    scripts = ["charts.js", "groups.js"] if "records" in data else ["charts.js"]
    page = environment.get_template(template).render(
        **values,
        style=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup("\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in scripts)),
        loads_side_files="records" in data,
        data={name: Markup(text) for name, text in data.items()},
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    with written_whole(path) as file:
        file.write(page.encode("utf-8", "replace"))


def _script_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
