"""The house's order, held by reading the imports: they point one way, and heavy ones come late."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from chatfine.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "chatfine"

# the order of the story; a room may import itself and those before it
ROOMS = (
    ("i18n",),
    ("errors", "types", "console", "runtime", "config"),
    ("hub",),
    ("tokenizer",),
    ("data",),
    ("model",),
    ("evaluate",),
    ("train",),
    ("export",),
    ("serve",),
    ("commands",),
    ("flags", "helptext", "cli", "api", "tutorial", "__main__", "__init__"),
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
STRANGERS = [{"data", "model"}, {"train", "serve"}]
# the assembly of a run is train/run.py, which grew into prepare (what can refuse) and session
MAY_SEE_CONFIG = ("train.run", "train.prepare", "commands.", "cli", "flags", "tutorial")
HEAVY = {"torch", "transformers", "peft", "accelerate"}
HEAVY_ROOMS = ("model.", "evaluate.loss", "train.", "export.merge", "serve.")
OPTIONAL = {
    "accelerate", "auditnlg", "azure", "bitsandbytes", "liger_kernel", "lm_eval", "matplotlib",
    "modelscope", "ray", "rouge_score", "sacrebleu", "swanlab", "tensorboard", "trackio", "triton",
    "wandb",
}  # fmt: skip

TRITON_PROGRAMS = {"model.kernels", "model.fp8_kernels"}
"""Too many for one file; what multiplies and what rounds to 8 bits."""


@dataclass(frozen=True)
class Import:
    """One import of a module: who, what, on which line, and when it runs."""

    who: str  # dotted, below chatfine
    what: str  # dotted, whole
    line: int
    at_import: bool  # runs when the module is imported
    typing: bool  # only read by the type checker


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@lru_cache(maxsize=1)
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def scan(who: str, node: ast.AST, at_import: bool = True, typing: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(who, alias.name, child.lineno, at_import, typing)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"{who}:{child.lineno}: relative import"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                is_module = whole.removeprefix("chatfine.") in modules()
                what = whole if is_module else child.module or ""
                yield Import(who, what, child.lineno, at_import, typing)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from scan(who, child, False, typing)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for part in child.body:
                yield from scan(who, ast.Module([part], []), at_import, True)
            for part in child.orelse:
                yield from scan(who, ast.Module([part], []), at_import, typing)
        else:
            yield from scan(who, child, at_import, typing)


@lru_cache(maxsize=1)
def imports() -> tuple[Import, ...]:
    return tuple(
        found
        for name, path in modules().items()
        for found in scan(name, ast.parse(path.read_text(encoding="utf-8")))
    )


def inside(found: Import) -> str | None:
    """The module below chatfine that is imported, None for a library."""
    if found.what == "chatfine":
        return "__init__"
    return found.what.removeprefix("chatfine.") if found.what.startswith("chatfine.") else None


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_room() -> None:
    assert sorted(name for name in modules() if room(name) not in RANK) == []


def test_imports_point_up_the_list() -> None:
    wrong = []
    for found in imports():
        target = inside(found)
        # __version__ is the one thing that lies in the package itself
        if target is None or target == "__init__":
            continue
        if RANK[room(target)] > RANK[room(found.who)]:
            wrong.append(f"{found.who}:{found.line} imports {target}")
    assert wrong == []


def test_strangers_do_not_meet() -> None:
    wrong = [
        f"{found.who}:{found.line} imports {inside(found)}"
        for found in imports()
        if (target := inside(found)) and {room(found.who), room(target)} in STRANGERS
    ]
    assert wrong == []


def test_hub_never_sees_the_tokenizer() -> None:
    # the order forbids it already; the tokenizer folder of a GGUF is joined in commands/get.py
    assert [i for i in imports() if room(i.who) == "hub" and "tokenizer" in (inside(i) or "")] == []


def test_no_import_cycles() -> None:
    graph = {name: set() for name in modules()}
    for found in imports():
        target = inside(found)
        if target in graph and target != found.who and target != "__init__" and not found.typing:
            graph[found.who].add(target)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_doors_see_the_config() -> None:
    wrong = [
        f"{found.who}:{found.line}"
        for found in imports()
        if inside(found) == "config" and not found.who.startswith(MAY_SEE_CONFIG)
    ]
    assert wrong == []


def test_heavy_libraries_are_imported_late() -> None:
    wrong = [
        f"{found.who}:{found.line} imports {found.what}"
        for found in imports()
        if found.what.partition(".")[0] in HEAVY
        and found.at_import
        and not found.typing
        and not f"{found.who}.".startswith(HEAVY_ROOMS)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_can_refuse_before_torch(name: str) -> None:
    """Importing a command's module must not load torch, or bad input costs seconds."""
    entry = COMMANDS[name].target.partition(":")[0].removeprefix("chatfine.")
    assert entry in modules(), f"{entry} does not exist"
    todo, seen, heavy = [entry], set(), []
    while todo:
        current = todo.pop()
        seen.add(current)
        for found in imports():
            if found.who != current or not found.at_import or found.typing:
                continue
            target = inside(found)
            if target is None and found.what.partition(".")[0] in HEAVY:
                heavy.append(f"{current}:{found.line} imports {found.what}")
            elif target in modules() and target not in seen:
                todo.append(target)
    assert heavy == []


def test_an_optional_library_is_imported_in_one_file() -> None:
    users: dict[str, set[str]] = {}
    for found in imports():
        library = "tensorboard" if "tensorboard" in found.what else found.what.partition(".")[0]
        if library in OPTIONAL:
            users.setdefault(library, set()).add(found.who)
    several = {library: files for library, files in users.items() if len(files) > 1}
    assert several == {"triton": TRITON_PROGRAMS}


def test_every_import_is_declared() -> None:
    """A library the code imports is in pyproject.toml (or comes with Python)."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    declared = {re.split(r"[<>=!\[ ]", line)[0].lower().replace("-", "_") for line in wanted}
    declared |= {"chatfine", "yaml", "google", "typing_extensions"}  # PyYAML, protobuf, pydantic's
    # azure-ai-contentsafety; auditnlg wants old chat frameworks, so no extra of ours promises it
    declared |= {"azure", "auditnlg"}
    declared |= {"triton"}  # comes with torch where torch has it, in the version torch needs
    used = {found.what.partition(".")[0] for found in imports()}
    assert sorted(used - declared - set(sys.stdlib_module_names)) == []
