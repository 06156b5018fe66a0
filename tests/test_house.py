"""The rules that hold the house up: who imports whom, what a module may be called and call, what the wheel holds."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from semi_fast.schema.yaml_file import StrictLoader

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("pipelines", "data_prep", "configs")
NOT_SOURCE = ("build", "dist", "data", "runs")

# A module imports only modules of lower floors, and those of its own room.
FLOORS = (
    "cli",
    "commands",
    "train reproduce",
    "report loop pipelines data_prep",
    "methods models rundir",
    "ops schema prepared",
    "batch processes philox screen table launch sealed_json",
    "disk",
    "errors",
)
LEVEL = {name: -number for number, names in enumerate(FLOORS) for name in names.split()}
LINE_LIMIT = 350


def second(name: str) -> str:
    """`step` of semi_fast.loop.step, `ops` of semi_fast.ops.bank_push.reference; empty for semi_fast itself."""
    return f"{name}.".split(".")[1]


parsed = functools.cache(ast.parse)


class Module(NamedTuple):
    name: str
    path: Path
    text: str

    @property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @property
    def part(self) -> str:
        return second(self.name)


class Import(NamedTuple):
    name: str
    line: int
    in_function: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


def source_files(folder: Path, *suffixes: str) -> Iterator[Path]:
    """Files under `folder`, through links, caches left out."""
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        yield from (Path(at, name) for name in sorted(files) if Path(name).suffix in suffixes)


def product_modules() -> list[Module]:
    """Every module of semi_fast under its one spelling; the linked folders once."""
    modules = []
    for path in source_files(ROOT / "semi_fast", ".py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(Module(name, path, path.read_text(encoding="utf-8")))
    return modules


MODULES = product_modules()
NAMES = {module.name for module in MODULES}
by_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


def imports(tree: ast.Module, module: str = "", *, package: bool = False) -> list[Import]:
    """What a module imports, absolute, submodules by their own name; wherever the statement stands."""
    inside = {id(node) for function in ast.walk(tree) if is_function(function) for node in ast.walk(function)}
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            targets = {name if name in NAMES else base for name in whole}
            found += [Import(name, node.lineno, id(node) in inside) for name in sorted(targets)]
    return found


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


@functools.cache
def imports_of(module: Module) -> list[Import]:
    return imports(module.tree, module.name, package=module.path.name == "__init__.py")


def forbidden_import(part: str, imported: Import) -> bool:
    """Whether the table of levels forbids a module of `part` what it imports."""
    target = second(imported.name)
    if imported.top != "semi_fast" or target in ("", part):
        return False
    return LEVEL[target] >= LEVEL[part]


def test_the_walk_sees_the_modules() -> None:
    assert {
        "semi_fast",
        "semi_fast.loop.step",
        "semi_fast.pipelines.augment",
        "semi_fast.data_prep.readers.cifar",
    } <= NAMES
    assert len({module.path.resolve() for module in MODULES}) == len(MODULES), "each file once"
    assert sum(len(imports_of(module)) for module in MODULES) > 300


def test_every_module_has_a_level() -> None:
    assert {module.part for module in MODULES} - LEVEL.keys() == {""}


@by_module
def test_a_module_imports_only_lower_levels(module: Module) -> None:
    broken = [f"line {i.line}: {i.name}" for i in imports_of(module) if forbidden_import(module.part, i)]
    if module.name == "semi_fast":
        broken = [i.name for i in imports_of(module) if i.name != "__future__"]
    assert broken == []


@pytest.mark.parametrize(
    ("part", "statement", "forbidden"),
    [
        ("methods", "from semi_fast.loop.step import TrainStep", True),
        ("methods", "from semi_fast.loop import step", True),
        ("methods", "import semi_fast.loop.step as s", True),
        ("loop", "def f():\n    from semi_fast.pipelines.source import open_source", True),
        ("loop", "from ..pipelines import source", True),
        ("pipelines", "from semi_fast.data_prep import prepare", True),
        ("data_prep", "from semi_fast.pipelines.augment import Augmenter", True),
        ("loop", "from semi_fast.data_prep.long_tail import split_for", True),
        ("train", "from semi_fast.cli import main", True),
        ("train", "def f():\n    from semi_fast.commands.demo import demo", True),
        ("loop", "from semi_fast.rundir.runlog import Clock", False),
        ("methods", "from semi_fast.ops.bank_push import bank_push", False),
        ("loop", "from semi_fast.loop.step import TrainStep", False),
        ("loop", "from semi_fast import __version__", False),
    ],
)
def test_the_table_of_levels_can_be_broken(part: str, statement: str, forbidden: bool) -> None:
    found = imports(ast.parse(statement), f"semi_fast.{part}.module")
    assert [forbidden_import(part, one) for one in found] == [forbidden]


KERNELS = {m.name for m in MODULES if m.part == "ops" and m.name.endswith(".kernel")}
# Modules that import a package where they begin, since they are themselves imported inside functions.
IMPORTED_INSIDE_FUNCTIONS = {"triton": KERNELS, "numba": {"semi_fast.ops.rand_augment.cpu"}}


def outsiders(module: Module) -> set[str]:
    """Top-level names of other people's packages that a module imports."""
    return {one.top for one in imports_of(module)} - set(sys.stdlib_module_names) - {"semi_fast"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.part == "ops"], ids=lambda module: module.name)
def test_ops_import_torch_and_their_compiler_alone(module: Module) -> None:
    """Triton for kernels; for the views on a CPU numba, whose arrays are numpy's, in one file."""
    numba = {"numba", "numpy"} if module.name in IMPORTED_INSIDE_FUNCTIONS["numba"] else set()
    assert outsiders(module) <= {"torch", "triton"} | numba
    ours = {one.name for one in imports_of(module) if one.top == "semi_fast"}
    assert all(name.startswith("semi_fast.ops") or name == "semi_fast.philox" for name in ours), ours


@pytest.mark.parametrize("module", [m for m in MODULES if m.part == "methods"], ids=lambda module: module.name)
def test_methods_see_no_config_source_launcher_or_optimizer(module: Module) -> None:
    assert outsiders(module) <= {"torch"}
    banned = ("semi_fast.schema.config", "semi_fast.schema.yaml_file", "semi_fast.pipelines", "semi_fast.data_prep")
    names = [one.name for one in imports_of(module)]
    assert [name for name in names if name.startswith((*banned, "torch.optim", "accelerate"))] == []
    used = {node.id for node in ast.walk(module.tree) if isinstance(node, ast.Name)}
    assert "Config" not in used


@pytest.mark.parametrize("package", ["ffcv", "nvidia", "numba", "triton"])
def test_optional_packages_are_imported_inside_functions(package: str) -> None:
    found = {m.name for m in MODULES for one in imports_of(m) if one.top == package and not one.in_function}
    assert found <= IMPORTED_INSIDE_FUNCTIONS.get(package, set())
    assert [one for m in MODULES for one in imports_of(m) if one.name in found and not one.in_function] == []


def test_importing_the_library_and_its_command_line_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"torch", "torchvision", "timm", "triton", "accelerate", "numpy", "matplotlib", "sklearn", "jsonargparse"}
    code = f"import sys, semi_fast, semi_fast.cli; print(sorted({heavy} & set(sys.modules)))"
    end = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert end.stdout.strip() == "[]"


def test_a_module_is_named_after_what_it_owns() -> None:
    names = [part for module in MODULES for part in module.name.split(".")]
    names += [path.stem for path in source_files(ROOT / "benchmarks", ".py")]
    assert set(names) & {"util", "utils", "misc", "helper", "helpers", "common"} == set()


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """`accelerate launch semi_fast/train.py` puts semi_fast/ first on sys.path."""
    top = {path.stem for path in (ROOT / "semi_fast").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert "train" in top
    assert top & set(sys.stdlib_module_names) == set()


def test_the_linked_folders_have_one_spelling() -> None:
    paths = [m.path for m in MODULES] + [p for d in ("tests", "benchmarks") for p in source_files(ROOT / d, ".py")]
    found = {path.name: {i.top for i in imports(ast.parse(path.read_text()))} & set(LINKED) for path in paths}
    assert {name: bare for name, bare in found.items() if bare} == {}
    assert [i.top for i in imports(ast.parse("import pipelines.augment"))] == ["pipelines"], "a bare one would be seen"


@pytest.mark.parametrize("name", LINKED)
def test_the_links_are_relative(name: str) -> None:
    link = ROOT / "semi_fast" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "StrictLoader"}
READS_PICKLES = "semi_fast.data_prep.restricted_unpickler"


def unsafe(tree: ast.Module, module: str = "") -> list[str]:
    """Calls and imports through which a file or an argument could run code."""
    found = [f"import {i.name}" for i in imports(tree) if i.top in UNSAFE_MODULES and module != READS_PICKLES]
    found += [f"import {i.name}" for i in imports(tree) if i.name == "yaml" and _names_from(tree, "yaml")]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {key.arg: key.value for key in call.keywords}
        last = name.split(".")[-1]
        loader = [ast.unparse(value) for value in (given.get("Loader"), *call.args[1:2]) if value]
        if (
            name in UNSAFE_CALLS
            or (name.startswith("pickle.") and last in ("load", "loads", "Unpickler", "_Unpickler"))
            or (name.startswith("yaml.") and last in ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all"))
            or (name in ("yaml.load", "yaml.load_all") and not SAFE_LOADERS & {one.split(".")[-1] for one in loader})
            or ("allow_pickle" in given and ast.unparse(given["allow_pickle"]) != "False")
            or ("shell" in given and ast.unparse(given["shell"]) != "False")
        ):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def _names_from(tree: ast.Module, package: str) -> list[str]:
    return [a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == package for a in n.names]


@by_module
def test_nothing_read_can_run_code(module: Module) -> None:
    assert unsafe(module.tree, module.name) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import pickle",
        "from pickle import load",
        "import joblib",
        "pickle.load(file)",
        "pickle.Unpickler(file).load()",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "from yaml import load",
        "eval(text)",
        "exec(text)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_an_unsafe_line_would_be_seen(statement: str) -> None:
    assert unsafe(ast.parse(statement)) != []


def test_safe_lines_are_let_through() -> None:
    lines = "np.load(p, allow_pickle=False)\nyaml.load(t, StrictLoader)\nyaml.load(t, Loader=yaml.SafeLoader)\nm.eval()"
    assert unsafe(ast.parse(lines)) == []
    assert issubclass(StrictLoader, yaml.SafeLoader)


@by_module
def test_a_module_is_short_and_says_what_it_is(module: Module) -> None:
    assert len(module.text.splitlines()) <= LINE_LIMIT
    first = (ast.get_docstring(module.tree) or "").split("\n\n")[0]
    assert first.endswith((".", ":")) or "; " in first, "the docstring opens with one sentence"


def test_no_file_names_a_machine_or_leaves_work_undone() -> None:
    machine = re.compile(r"(?<![\w.~:/-])/(home|root|work|tmp|Users|mnt|scratch)/|[A-Z]:\\\\Users")
    undone = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    folders = ("semi_fast", "benchmarks", "docs", "tests")
    paths = [p for f in folders for p in source_files(ROOT / f, ".py", ".md", ".yaml", ".html", ".toml", ".csv")]
    found = []
    for path in [*paths, ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "Makefile"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if path != Path(__file__) and (machine.search(line) or undone.search(line)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
    assert machine.search("data = '/home/me/x'")
    assert undone.search("# TO" + "DO later")


class Built(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of a copy of the tree, and the wheel made from that sdist."""
    top = tmp_path_factory.mktemp("build")
    copy, out = top / "copy", top / "out"
    copy.mkdir()
    caches = shutil.ignore_patterns("__pycache__")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in NOT_SOURCE or path.suffix == ".egg-info":
            continue
        if path.is_dir():
            shutil.copytree(path, copy / path.name, symlinks=True, ignore=caches)
        else:
            shutil.copy2(path, copy / path.name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    end = subprocess.run(command, capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-2000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


def test_the_wheel_holds_the_library_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
    assert {re.sub(r"-[\d.]+dist-info$", "-dist-info", name.split("/")[0]) for name in names} == {
        "semi_fast",
        "semi_fast-dist-info",
    }
    code = {name for name in names if name.endswith(".py")}
    assert code == {str(module.path.relative_to(ROOT)) for module in MODULES}
    configs = {str(path.relative_to(ROOT)) for path in source_files(ROOT / "semi_fast" / "configs", ".yaml")}
    assert configs
    data = {name for name in names - code if name.startswith("semi_fast/")}
    assert data == configs | {
        "semi_fast/data_prep/imagenet127.json",
        "semi_fast/py.typed",
        "semi_fast/report/page.html",
        "semi_fast/reproduce/cells.yaml",
    }
    assert {Path(name).name for name in names if "/licenses/" in name} >= {"LICENSE"}


def test_the_sdist_needs_nothing_outside_itself(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        members = sdist.getmembers()
    assert {member.name for member in members if not (member.isfile() or member.isdir())} == set(), "no links"
    names = {member.name.partition("/")[2] for member in members}
    assert {"pyproject.toml", "README.md", "LICENSE", "semi_fast/pipelines/augment.py"} <= names
    assert [name for name in names if name.startswith(("benchmarks", "runs", "data/"))] == []
