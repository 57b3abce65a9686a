"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = {"rl", "rollout", "rewards", "recipes"}
FOREIGN = {"rl": {"trl"}, "rewards": {"torch", "transformers"}}


# Who may import whom. A name stands for a folder's own files, or for one module.
LAW: dict[str, set[str]] = {
    "rl.types": set(),
    "rl.config": {"rl.types"},
    "rl.model": {"rl.types", "rl.config"},
    "rl.store": {"rl.types", "rl.config"},
    "rl": {"rl.types", "rl.config", "rl.model", "rl.store"},
    "rl.plan": {"rl.types", "rl.config", "rl.model", "rl"},  # the probe runs the policy
    "rl.diffusion": {"rl.types", "rl.config", "rl.model", "rl.store", "rl"},
    "rl.moe": {"rl.types", "rl.config", "rl.model", "rl.store", "rl"},
    "rl.report": {"rl.types", "rl.config", "rl.store"},
    "rollout": {"rl.types", "rl.model"},
    "rollout.vllm": {"rl.types", "rl.model", "rollout"},
    "rollout.diffusion": {"rl.types", "rl.model", "rollout"},
    "rewards.sandbox": set(),
    "rewards.code": {"rl.types", "rewards.sandbox", "rewards"},
    "rewards.math": {"rl.types", "rewards"},
    "rewards.pool": {"rl.types", "rewards"},
    "rewards": {"rl.types", "rewards.math", "rewards.code", "rewards.pool"},
    "recipes": {"recipes.tasks", "recipes.environments", "recipes.evaluation", "recipes.exports"},
    "recipes.cli": {"recipes", "recipes.tasks", "recipes.evaluation", "recipes.exports"},
    "recipes.environments": set(),
    "recipes.evaluation": {"recipes"},
    "recipes.exports": {"recipes", "recipes.evaluation"},
    "recipes.tasks": set(),
}
TOP_OF_ALL = {
    "recipes",
    "recipes.cli",
    "recipes.environments",
    "recipes.evaluation",
    "recipes.exports",
    "recipes.tasks",
}  # they may import everything of ours
# Lines; what there is, to go down and not up. A file counts where it is named first.
BUDGETS = {
    "shards": (364, ["rl/sharded.py", "rl/model/units.py"]),
    "episodes": (1_031, [f"rollout/{name}.py" for name in ("environment", "episodes", "play", "turns")]),
    "distillation": (
        686,
        ["rl/teacher.py", "rl/config/teacher.py", "recipes/prune.py"]
        + [f"recipes/tasks/{name}.py" for name in ("demonstrations", "scoring")],
    ),
    "traces and pipeline": (
        1_117,
        ["recipes/rejection.py", "recipes/pipeline.py", "rl/config/traces.py"]
        + [f"recipes/tasks/{name}.py" for name in ("named", "overlap", "traces")],
    ),
    "environments": (1_824, ["recipes/environments/*.py"]),
    "core": (14_378, ["rl/*.py", "rl/config/*", "rl/plan/*", "rl/model/*", "rl/store/*", "rollout/*.py"]),
    "report": (2_245, ["rl/report/*.py"]),
    "templates of the report": (746, ["rl/report/*.j2", "rl/report/*.js", "rl/report/*.css"]),
    "diffusion": (3_629, ["rl/diffusion/*.py", "rollout/diffusion/*.py"]),
    "moe": (1_997, ["rl/moe/*.py"]),
    "servers": (
        2_261,
        [
            f"rollout/vllm/{name}.py"
            for name in (
                "broadcast",
                "control",
                "file_server",
                "fleet",
                "lock",
                "member",
                "served",
                "weight_files",
            )
        ],
    ),
    "vllm": (2_934, ["rollout/vllm/*.py"]),
    "math": (5_492, ["rewards/math/*.py"]),
    "code and sandbox": (3_906, ["rewards/code/*.py", "rewards/sandbox/*.py"]),
    "other rewards": (3_711, ["rewards/*.py", "rewards/pool/*.py"]),
    "recipes": (4_595, ["recipes/*.py", "recipes/tasks/*.py"]),
    "evaluation and exports": (822, ["recipes/evaluation/*.py", "recipes/exports/*.py"]),
    "cli": (1_442, ["recipes/cli/*.py"]),
}
# What the core may not speak of: a kind of model is a policy, a config and an engine of its own.
WORDS = ("diffusion", "canvas", "denois", "drawn_again")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in the file, inside functions and type-checking blocks too."""
    return names_in(parsed(path))


def names_in(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in OURS for path in files(package)}


def our_imports(module: str) -> set[str]:
    """Our modules that a module imports."""
    found = set()
    for name in imports(MODULES[module]):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def wing_of(module: str) -> str:
    if module in LAW:
        return module
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return package


def test_imports_go_in_the_allowed_direction():
    wrong = []
    for module in MODULES:
        wing = wing_of(module)
        for name in our_imports(module):
            to = wing_of(name)
            if to != wing and to not in LAW[wing] and (wing not in TOP_OF_ALL):
                wrong.append(f"{module} imports {name}")
    assert not wrong
    assert not [
        m
        for m in MODULES
        if wing_of(m) not in TOP_OF_ALL and {"recipes"} & {n.split(".")[0] for n in our_imports(m)}
    ]


def test_no_module_imports_itself_by_a_circle():
    """Imports for types alone count, too."""
    needs = {module: our_imports(module) for module in MODULES}
    while free := [module for module in needs if not needs[module] & needs.keys()]:
        for module in free:
            del needs[module]
    assert not needs, f"a circle is among {sorted(needs)}"


def test_vllm_is_imported_in_its_folder_only():
    for package in OURS:
        for path in files(package):
            tops = {name.split(".")[0] for name in imports(path)}
            assert "vllm" not in tops or path.parent == ROOT / "rollout" / "vllm", path
            if package in FOREIGN and path.name != "adapters.py":  # OpenRLHF's convention returns tensors
                assert not tops & FOREIGN[package], path


def test_each_wing_keeps_its_budget_of_lines():
    used: dict[str, int] = {}
    counted: set[Path] = set()
    for name, (_, patterns) in BUDGETS.items():
        found = {path for pattern in patterns for path in ROOT.glob(pattern)} - counted
        used[name], counted = sum(map(lines, found)), counted | found
    assert not {name: n for name, n in used.items() if n > BUDGETS[name][0]}


def test_a_folder_can_be_taken_in_at_a_glance():
    for package in OURS:
        for folder in {path.parent for path in files(package)}:
            number = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
            assert number <= (26 if folder == ROOT / "rewards" / "math" else 20), folder


def test_the_nouns_the_configs_and_the_graders_cost_no_torch():
    cheap = "rl.types rl.config.read rl.store.metrics rl.report.report recipes.cli rollout.chat rewards.math "
    cheap += "rewards.code rewards.sandbox rewards.format rewards.pool.pool rewards.doctor rewards.score"
    code = f"import sys, {', '.join(cheap.split())}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "False\n"


def test_every_package_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(m for m, path in MODULES.items() if path.name == "__init__.py")


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by their name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_no_file_of_tests_imports_another():
    """What several need is in a conftest, or in a module whose name does not begin with test_."""
    tests = (ROOT / "tests").rglob
    names = {path.stem for path in tests("test_*.py")}
    assert not {(path.name, n) for path in tests("*.py") for n in imports(path) if names & set(n.split("."))}


def test_files_keep_their_proportion():
    too_long = {str(p.relative_to(ROOT)): n for q in OURS for p in files(q) if (n := lines(p)) > 350}
    assert not too_long
    assert lines(ROOT / "rl" / "train.py") <= 180


def test_functions_fit_a_screen():
    too_long = {
        f"{path.relative_to(ROOT)}:{node.name}": size
        for package in OURS
        for path in files(package)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (size := own_lines(node)) > 60
    }
    assert not too_long


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, without those of a class that it makes: its methods count for themselves."""
    span = lambda node: node.end_lineno - node.lineno + 1  # noqa: E731
    return span(function) - sum(span(part) for part in function.body if isinstance(part, ast.ClassDef))


# Called by position: by autograd, nn.Module, Triton and transformers (attention); as Callables of a `Kind`.
BY_POSITION = {"forward", "_forward_kernel", "_backward_kernel", "_part_of_row_kernel", "_whole_row_kernel"}
BY_POSITION |= {"packed_attention", "denoise_attention", "bidirectional_attention"}
BY_POSITION |= {"causal_policy", "causal_engine", "make_masked_policy"}


def test_no_function_takes_more_than_four_parameters_by_position():
    too_many = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": number
        for package in OURS
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name not in BY_POSITION
        and (number := num_by_position(node)) > 4
    }
    assert not too_many, "make everything after the second keyword-only"


def num_by_position(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = [*function.args.posonlyargs, *function.args.args]
    return len([a for a in given if a.arg not in ("self", "cls")])


def test_the_core_speaks_of_no_kind_of_model():
    found = [
        f"{path.name}: {word}"
        for path in sorted((ROOT / "rl").glob("*.py"))
        for word in WORDS
        if word in path.read_text().lower()
    ]
    assert not found


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_says_nothing():
    names = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    assert not [p for q in OURS for p in files(q) if p.stem in names]


def runs_code_on_purpose(path: Path) -> bool:
    """The confined child and the killable tester of the code grader: nothing else may."""
    return path.parent in (ROOT / "rewards" / "sandbox", ROOT / "rewards" / "code")


def test_nothing_evaluates_untrusted_text():
    """Calls of eval, exec, pickle.load(s), sympify and parse_expr, YAML read elsewhere than by
    `rl.config.bounded_yaml`, shell=True and trust_remote_code=True.
    """
    banned = {"eval", "exec", "sympify", "parse_expr"}
    for package in OURS:
        for path in files(package):
            for node in ast.walk(parsed(path)):
                if not isinstance(node, ast.Call):
                    continue
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                owner = getattr(getattr(node.func, "value", None), "id", "")
                if isinstance(node.func, ast.Name) or owner in ("sympy", "builtins"):
                    assert name not in banned or runs_code_on_purpose(path), where
                assert not (owner == "pickle" and name in ("load", "loads")), where
                assert owner != "yaml" or name == "safe_dump" or path.stem == "bounded_yaml", where
                for keyword in node.keywords:
                    value = getattr(keyword.value, "value", None)
                    assert not (keyword.arg in ("shell", "trust_remote_code") and value is True), where
                    assert not (keyword.arg == "weights_only" and value is False), where
