"""The layers of the package: imports point downward, without cycles, and inference stays light."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tests.processes import fresh_python

SOURCE = Path(__file__).resolve().parents[2] / "src"
PACKAGE = "wmh_lora"

# Module pattern (without the package's name) -> layer; the first match counts. A subpackage's own
# __init__ stands as high as its highest module, so that it may re-export any of them; a module
# below that imports from the submodule itself. A new module of a subpackage starts at the lowest
# layer of its kind: give it a line here when it belongs higher.
LAYERS: tuple[tuple[str, int], ...] = (
    ("_version", 0),
    ("downloads", 0),
    ("components", 0),
    ("errors", 0),
    ("files", 0),
    ("logs", 0),
    ("sizes", 0),
    ("assets", 0),
    ("assets.*", 0),
    ("config_reading", 0),
    ("config", 1),
    ("volume*", 1),
    ("view", 2),
    ("preprocess*", 2),
    ("postprocess*", 2),
    ("structures", 2),
    ("contrast", 1),
    ("lesion_geometry", 2),
    ("regions", 2),
    ("quality*", 2),
    ("t1*", 2),
    ("registration", 2),
    ("engine*", 4),
    ("models", 3),
    ("models.network", 2),
    ("models.budget", 3),
    ("models.init", 3),
    ("models.weights", 3),
    ("models.model_file", 3),
    ("models.model_edits", 3),
    ("models.site_adapter", 3),
    ("models.registry", 3),
    ("models.precision", 3),
    ("models.export_runtime", 1),
    ("models.export*", 3),
    ("models.backends", 3),
    ("models.*", 1),
    ("data", 3),
    ("data.dataset", 3),
    ("data.*", 2),
    ("evaluation", 3),
    ("evaluation.cohort", 3),
    ("evaluation.*", 1),
    ("longitudinal", 4),
    ("longitudinal.study", 4),
    ("longitudinal.*", 2),
    ("comparators", 4),
    ("comparators.*", 4),
    ("training", 4),
    ("training.losses", 2),
    ("training.*", 4),
    ("report", 4),
    ("report.*", 4),
    ("bids", 4),
    ("bids.names", 0),
    ("bids.discovery", 1),
    ("bids.*", 4),
    ("cli", 5),
    ("cli.*", 5),
    ("__main__", 6),
    ("", 6),  # the package itself: load_model and segment stand on top of the engine
)

# Top-level import names of the dependencies in pyproject.toml.
RUNTIME_LIBRARIES = frozenset(
    {
        "PIL",
        "click",
        "filelock",
        "jinja2",
        "markupsafe",
        "nibabel",
        "nrrd",
        "numpy",
        "rich",
        "safetensors",
        "scipy",
        "tomli",
        "torch",
    }
)
TRAINING_LIBRARIES = frozenset({"accelerate", "einops", "monai", "nilearn", "peft"})
EVALUATION_LIBRARIES = frozenset({"matplotlib"})
EXPORT_LIBRARIES = frozenset({"onnx", "onnxruntime", "openvino"})
REGISTRATION_LIBRARIES = frozenset({"SimpleITK"})
TABLE_LIBRARIES = frozenset({"pandas"})
MAY_IMPORT_TRAINING_LIBRARIES = (
    "training.*",
    "models.lora",
    "models.peft_folder",
    "data.*",
    "comparators.*",
    "cli.train",
    "cli.tune",
)

# Each costs seconds of start-up, or does not belong in an inference environment at all.
NEVER_IN_INFERENCE = (
    TRAINING_LIBRARIES
    | EVALUATION_LIBRARIES
    | EXPORT_LIBRARIES
    | REGISTRATION_LIBRARIES
    | TABLE_LIBRARIES
    | {"timm", "torchvision", "transformers"}
)


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    target: str
    line: int
    deferred: bool  # inside a function or under TYPE_CHECKING: not executed at import time


def _modules() -> dict[str, Path]:
    """Full module name -> file, for every module of the package."""
    modules = {}
    for path in sorted((SOURCE / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join(parts)] = path
    return modules


MODULES = _modules()


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _import_statements(
    node: ast.AST, deferred: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, deferred
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for statement in child.body:
                yield from _import_statements(ast.Module([statement], []), True)
            for statement in child.orelse:
                yield from _import_statements(ast.Module([statement], []), deferred)
        else:
            inside_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _import_statements(child, deferred or inside_function)


def _targets(statement: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    """Return what a statement imports, as full names; a submodule where one of that name exists.

    The package hands `__version__` on from `_version`, so that counts as the lower module.
    """
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    base = statement.module or ""
    if statement.level:
        parts = module.split(".")
        parts = parts[: len(parts) - statement.level + int(is_package)]
        base = ".".join([*parts, *([base] if base else [])])
    joined = [f"{base}.{alias.name}" for alias in statement.names]
    joined = [name.replace(f"{PACKAGE}.__version__", f"{PACKAGE}._version") for name in joined]
    return sorted({name if name in MODULES else base for name in joined})


def _imports(module: str) -> list[Import]:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return [
        Import(target, statement.lineno, deferred)
        for statement, deferred in _import_statements(tree)
        for target in _targets(statement, module, path.name == "__init__.py")
    ]


IMPORTS = {module: _imports(module) for module in MODULES}


def _short(module: str) -> str:
    return module.removeprefix(PACKAGE).removeprefix(".")


def _layer(module: str) -> int | None:
    return next((layer for pattern, layer in LAYERS if fnmatchcase(_short(module), pattern)), None)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _where(module: str, statement: Import) -> str:
    return f"{MODULES[module].relative_to(SOURCE)}:{statement.line}"


def test_every_module_has_a_layer() -> None:
    missing = [module for module in MODULES if _layer(module) is None]
    assert not missing, f"give these modules a line in LAYERS: {missing}"


def test_own_imports_name_modules_that_exist() -> None:
    unknown = [
        f"{_where(module, statement)} imports {statement.target}"
        for module, statements in IMPORTS.items()
        for statement in statements
        if _top(statement.target) == PACKAGE and statement.target not in MODULES
    ]
    assert not unknown, "\n".join(unknown)


def test_no_module_imports_from_a_higher_layer() -> None:
    upward = []
    for module, statements in IMPORTS.items():
        own = _layer(module)
        for statement in statements:
            other = _layer(statement.target) if statement.target in MODULES else None
            if own is not None and other is not None and other > own:
                upward.append(
                    f"{_where(module, statement)} (layer {own}) imports "
                    f"{statement.target} (layer {other})"
                )
    assert not upward, "\n".join(upward)


def test_no_import_cycles() -> None:
    """Deferred imports count as well: a cycle that is hidden in a function is still a cycle."""
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in finished:
            return
        for statement in IMPORTS[module]:
            if statement.target in MODULES:
                visit(statement.target, (*trail, module))
        finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_third_party_imports_are_declared_dependencies() -> None:
    undeclared = [
        f"{_where(module, statement)} imports {statement.target}"
        for module, statements in IMPORTS.items()
        for statement in statements
        if _top(statement.target)
        not in RUNTIME_LIBRARIES
        | TRAINING_LIBRARIES
        | EVALUATION_LIBRARIES
        | EXPORT_LIBRARIES
        | REGISTRATION_LIBRARIES
        | TABLE_LIBRARIES
        | sys.stdlib_module_names
        | {PACKAGE}
    ]
    assert not undeclared, "\n".join(undeclared)


def test_only_training_code_imports_training_libraries() -> None:
    misplaced = [
        f"{_where(module, statement)} imports {statement.target}"
        for module, statements in IMPORTS.items()
        for statement in statements
        if _top(statement.target) in TRAINING_LIBRARIES
        and not any(fnmatchcase(_short(module), name) for name in MAY_IMPORT_TRAINING_LIBRARIES)
    ]
    assert not misplaced, "\n".join(misplaced)


def _loaded_by(imports: str, libraries: frozenset[str]) -> list[str]:
    """Return those of ``libraries`` that a fresh interpreter has loaded after ``imports``."""
    code = (
        f"import json, sys; import {imports}; "
        f"print(json.dumps([name for name in {sorted(libraries)!r} if name in sys.modules]))"
    )
    finished = fresh_python(code)
    assert finished.returncode == 0, finished.stderr
    loaded: list[str] = json.loads(finished.stdout)
    return loaded


def test_inference_does_not_load_training_libraries() -> None:
    assert _loaded_by(f"{PACKAGE}, {PACKAGE}.engine", NEVER_IN_INFERENCE) == []


def test_command_line_starts_without_heavy_libraries() -> None:
    """`wmh-lora --help` must answer at once, so commands import what they need when they run."""
    heavy = NEVER_IN_INFERENCE | {"nibabel", "scipy", "torch"}
    assert _loaded_by(f"{PACKAGE}.cli.main", heavy) == []
