"""How much host memory is free for the processes of a run, and how much of it they would pin."""

from __future__ import annotations

from pathlib import Path

import psutil

from rl.config import Config
from rl.model.loading import storage_dtype
from rl.plan.memory import GIB, Planned, layers_of_reference
from rl.plan.sizes import ModelSize, adapters_of

HOST_FILLED = 0.9
"""Share of the free host memory that a plan may pin."""
LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files with a control group's limit and use, and a line of its memory.stat; in versions 2 and 1."""


def moments_on_host(size: ModelSize, config: Config) -> int:
    """Bytes of both moments of every trained weight."""
    lora = config.model.lora
    trained = size.parameters if lora is None else adapters_of(size, lora).weights
    return 2 * trained * (4 if lora else storage_dtype(config.model).itemsize)


def layers_on_host(size: ModelSize, config: Config) -> int:
    """Bytes of the reference's layers."""
    return layers_of_reference(size, config)[0]


def pinned(size: ModelSize, config: Planned) -> int:
    """Bytes that a process pins under the keys of `memory` that are on."""
    if not isinstance(config, Config):
        return 0
    memory = config.memory
    moments = moments_on_host(size, config) if memory.optimizer_on_host is True else 0
    return moments + (layers_on_host(size, config) if memory.reference_on_host is True else 0)


def host_share(config: Planned, processes: int) -> int:
    """Bytes that each of `processes` on this host may pin: of `memory.host_gib`, or of what is free."""
    given = config.memory.host_gib if isinstance(config, Config) else "auto"
    return int(HOST_FILLED * free_bytes() if given == "auto" else given * GIB) // processes


def free_bytes(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine and every control group around this process still give."""
    free = psutil.virtual_memory().available
    for line in proc.read_text().splitlines() if proc.is_file() else ():
        _, names, path = line.split(":", 2)
        if names and "memory" not in names.split(","):
            continue
        top = root / "memory" if names else root
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            free = min(free, _left(folder, free))
            if folder == top:
                break
    return free


def _left(folder: Path, otherwise: int) -> int:
    """What a control group may still take, with pages of files that were not used lately."""
    for limit, used, pages in LIMITS:
        if (folder / limit).is_file() and (most := (folder / limit).read_text().strip()).isdecimal():
            kept = dict(x.split() for f in folder.glob("memory.stat") for x in f.read_text().splitlines())
            return max(0, int(most) - int((folder / used).read_text()) + int(kept.get(pages, 0)))
    return otherwise


def check_host(size: ModelSize, config: Planned, host: int | None) -> None:
    """Raises ValueError if a process would pin more than `host` bytes (None: unknown); the kernel would
    otherwise end a process of this machine silently.
    """
    if host is not None and (needed := pinned(size, config)) > host:
        raise ValueError(
            f"each process would keep {needed / GIB:.1f} GiB of moments and reference in host memory, and "
            f"may take {host / GIB:.1f}; use memory.optimizer_on_host=auto, memory.reference_on_host=auto or "
            "fewer processes on this host; where a machine's memory grows as it is used, set memory.host_gib "
            "to what all of them may take together"
        )
