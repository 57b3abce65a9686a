"""Programs. Importing this before torch sets how torch's threads wait, and puts our packages before files of
the same name.
"""

import os
import sys

# By default OpenMP's threads spin while they wait. If another program uses the same cores, each spinning
# thread takes the core from the one it waits for: a training pass of 1.4 s took 20 to 50 s, but only 7 s with
# sleeping threads. On idle cores training is as fast, and a small forward pass is 20 % slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

OURS = ("recipes", "rl", "rollout", "rewards")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def put_ours_first(path: list[str]) -> list[str]:
    """`sys.path` with folders that could hide our packages (the working directory among them) moved after
    ours. A child process that is given this path imports the same modules.
    """

    def hides(entry: str) -> bool:
        folder = os.path.realpath(entry)
        files = (os.path.join(folder, name + end) for name in OURS for end in (".py", "/__init__.py"))
        return folder == os.path.realpath("") or any(map(os.path.exists, files))

    ours = [entry for entry in path if os.path.realpath(entry) == os.path.realpath(ROOT)]
    others = [(entry, hides(entry)) for entry in path if entry not in ours]
    first, last = ([entry for entry, hiding in others if hiding is side] for side in (False, True))
    return [*first, ours[0] if ours else ROOT, *last]


for _name in OURS[1:]:
    _file = getattr(sys.modules.get(_name), "__file__", None)
    if _file and os.path.dirname(os.path.dirname(os.path.realpath(_file))) != os.path.realpath(ROOT):
        raise ImportError(f"{_file} is imported as {_name!r}, the name of a package of Cohort: rename it")
sys.path[:] = put_ours_first(sys.path)
