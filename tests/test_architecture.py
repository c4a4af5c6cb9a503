"""Who may import whom, how long files and functions may be, and what may stand nowhere: ARCHITECTURE.md, as a test.

Every rule is a function from a tree to the sentences that name what breaks it. Each is run over the repository, where
it must find nothing, and over a small tree with planted faults, all of which it must find.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools.discovery import PEP420PackageFinder

ROOT = Path(__file__).parents[1]

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

MAY_IMPORT = {
    "hashring": set(),
    "dense_head": set(),
    "ps": {"hashring"},
    "router": {"ps", "dense_head"},
    "benchmarks": {"router", "dense_head", "ps", "hashring"},
    "deploy": {"benchmarks", "router", "dense_head", "ps", "hashring"},
}
PRODUCT = tuple(MAY_IMPORT)

PS_LAYERS = (  # from the bottom; a module may import its own layer and those below
    {"errors", "ragged", "spec", "share", "kernels", "optimizers", "memory", "config", "runtime", "loop"},
    {"arena", "rowblock", "shared", "slots", "window"},
    {"store", "replication", "rebalance", "failover"},
    {"wire", "fabric", "service", "exports", "peers", "meter", "viewlog"},
    {"client", "checkpoint", "nn", "bulk"},
    {"server", "controller"},
    {"cluster", "rayhead"},
)

ONLY_IMPORTS = {  # beside the standard library
    "hashring": {"numpy", "numba", "uhashring"},
    "dense_head": {"numpy", "torch", "safetensors"},
}
FENCES = {  # third-party package -> the files that may import it
    "ray": r"\w+/server(/.*)?\.py|ps/(controller|cluster)(/.*)?\.py|(deploy|benchmarks)/.*",
    "grpc": r"router/grpc\w*(/.*)?\.py|benchmarks/.*",
    "grpc_health": r"router/grpc\w*(/.*)?\.py|benchmarks/.*",
    "grpc_reflection": r"router/grpc\w*(/.*)?\.py|benchmarks/.*",
    "torch": r"(dense_head|router|deploy|benchmarks)/.*|ps/(nn|server|store|kernels/pool)(/.*)?\.py",
    "uhashring": r"hashring/ring\.py",
    "uvloop": r"(ps|router|benchmarks)/.*",
    "typer": r"deploy/.*",
    "pickle": r"",
    "cloudpickle": r"",
}
THROUGH_ANOTHER = {"llvmlite": "numba", "google": "protobuf"}  # import name -> the declared distribution it comes with

BANNED = {
    r"\b(TODO|FIXME|XXX|HACK)\b": "unfinished work belongs in no file",
    r"(?i)\bmilestones?\b|\bissues? #?\d": "the repository does not speak of how it was planned",
    r"(?<![\w.~-])/(home|root|mnt|work)/[a-z]": "a path of one machine",
    r"--(extra-)?index-url": "a package registry's address",
    r"\bparallel=True": "two threads inside numba's parallel kernels end the process; kernels are serial",
    r"\bfastmath=(True|\{[^}]*n(nan|inf))": "kernels may not assume finite values",
    r"""["']ray["'], *["']stop["']""": "it ends every Ray of the machine; end only our own",
    r"\b(pkill|killall)\b": "processes are ended by their number",
}
TEXT = ("*.py", "*.md", "*.toml", "*.yaml", "*.txt", "Makefile", ".ci/run", "*.proto")


@dataclass(frozen=True)
class Import:
    """One imported module with the names taken from it (none for `import x`), and where."""

    module: str
    names: tuple[str, ...]
    place: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """A product file: its path below the root, its lines and its syntax tree."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def folder(self) -> str:
        return self.path.partition("/")[0]

    def imports(self) -> Iterator[Import]:
        """Every import of the file, those inside functions too; relative ones made absolute."""
        package = Path(self.path).parent.parts
        for node in ast.walk(self.tree):
            place = f"{self.path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, (), place)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join((*above, *filter(None, [node.module])))
                yield Import(module, tuple(alias.name for alias in node.names), place)


def sources(root: Path) -> list[Source]:
    """The product's files, but for what a compiler generated."""
    files = [file for folder in PRODUCT for file in sorted((root / folder).rglob("*.py"))]
    hand_written = [f for f in files if not f.name.endswith(("_pb2.py", "_pb2_grpc.py"))]
    return [Source(f.relative_to(root).as_posix(), f.read_text()) for f in hand_written]


# -- the rules --------------------------------------------------------------------------------------------------------


def folders_import_downwards(root: Path) -> Iterator[str]:
    for source in sources(root):
        for found in source.imports():
            if found.top in MAY_IMPORT and found.top != source.folder and found.top not in MAY_IMPORT[source.folder]:
                allowed = ", ".join(sorted(MAY_IMPORT[source.folder])) or "nothing of ours"
                yield f"{found.place} imports {found.module}; {source.folder} may import {allowed}"
            if found.top == "tests":
                yield f"{found.place} imports {found.module}; tests are not installed"


def router_takes_exported_names_only(root: Path) -> Iterator[str]:
    exported = _exported(root / "ps" / "__init__.py") | {"nn"}
    for source in sources(root):
        if source.folder not in ("router", "dense_head"):
            continue
        for found in source.imports():
            inner = set(found.names) if found.names else {found.module.partition(".")[2]} - {""}
            if found.top == "ps" and inner - exported:
                names = ", ".join(sorted(inner - exported))
                yield f"{found.place} takes {names} from {found.module}; ps does not export that name"
        for node in ast.walk(source.tree):
            through_ps = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ps"
            if through_ps and node.attr not in exported:
                yield f"{source.path}:{node.lineno} uses ps.{node.attr}; ps does not export that name"


def _exported(init: Path) -> set[str]:
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def ps_imports_downwards(root: Path) -> Iterator[str]:
    layer = {name: number for number, names in enumerate(PS_LAYERS) for name in names}
    for source in sources(root):
        module = _inner(source.path)
        if source.folder != "ps" or module == "__init__":
            continue  # ps/__init__.py only hands names on, each imported when it is asked for
        if module not in layer:
            yield f"{source.path} is in no layer; place {module!r} in PS_LAYERS or inside a module's package"
            continue
        for found in source.imports():
            if found.top != "ps":
                continue
            direct = found.module.split(".")[1:2] or found.names
            for name in direct:
                if name not in layer:
                    yield f"{found.place} imports {name} from ps; import it from the module that has it"
                elif layer[name] > layer[module]:
                    yield f"{found.place} imports ps.{name}, which lies above ps.{module}"


def _inner(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def imports_have_no_cycle(root: Path) -> Iterator[str]:
    """Among whole modules of each folder; imports inside functions count, since hiding a cycle does not break it."""
    edges: dict[str, set[str]] = {}
    for source in sources(root):
        if source.path.count("/") == 1 and source.path.endswith("/__init__.py"):
            continue  # a package's front door imports everything, and nothing inside imports it
        edges.setdefault(f"{source.folder}.{_inner(source.path)}", set()).update(
            ".".join([found.top, (found.module.split(".")[1:2] or list(found.names) or ["__init__"])[0]])
            for found in source.imports()
            if found.top in PRODUCT
        )
    state: dict[str, str] = {}

    def walk(at: str, path: tuple[str, ...]) -> Iterator[str]:
        if state.get(at) == "open":
            yield "the imports form a cycle: " + " -> ".join((*path[path.index(at) :], at))
        if at in state:
            return
        state[at] = "open"
        for to in sorted(edges.get(at, ())):
            if to != at:
                yield from walk(to, (*path, at))
        state[at] = "done"

    for start in sorted(edges):
        yield from walk(start, ())


def third_parties_stay_inside_their_fences(root: Path) -> Iterator[str]:
    for source in sources(root):
        allowed = ONLY_IMPORTS.get(source.folder)
        for found in source.imports():
            if found.top in FENCES and not re.fullmatch(FENCES[found.top], source.path):
                yield f"{found.place} imports {found.top}, which only {FENCES[found.top] or 'nobody'} may"
            ours = found.top in PRODUCT or found.top in sys.stdlib_module_names or found.top == "__future__"
            if allowed is not None and not ours and found.top not in allowed:
                yield f"{found.place} imports {found.top}; {source.folder} may import {', '.join(sorted(allowed))}"


def third_parties_are_declared(root: Path) -> Iterator[str]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {_distribution(line) for line in project["dependencies"]}
    known = packages_distributions()
    for source in sources(root):
        if source.folder == "benchmarks":
            continue  # peers are optional, and said to be missing where they are
        for found in source.imports():
            if found.top in PRODUCT or found.top in sys.stdlib_module_names:
                continue
            sold_as = {_distribution(name) for name in known.get(found.top, [])}
            sold_as.add(THROUGH_ANOTHER.get(found.top, found.top))
            if not sold_as & declared:
                yield f"{found.place} imports {found.top}, which is no dependency in pyproject.toml"


def _distribution(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def files_are_short(root: Path) -> Iterator[str]:
    for source in sources(root):
        lines = source.text.count("\n")
        if lines >= FILE_LINES_MAX:
            yield f"{source.path} has {lines} lines; a product file has fewer than {FILE_LINES_MAX}"


def functions_are_short(root: Path) -> Iterator[str]:
    for source in sources(root):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    yield (
                        f"{source.path}:{node.lineno} function {node.name} has {lines} lines; "
                        f"at most {FUNCTION_LINES_MAX} are allowed"
                    )


def nothing_banned_is_said(root: Path) -> Iterator[str]:
    folders = [*(root / name for name in (*PRODUCT, "tests")), root]
    files = {f for folder in folders for pattern in TEXT for f in _matching(folder, pattern, deep=folder != root)}
    for file in sorted(files - {Path(__file__)}):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for pattern, why in BANNED.items():
                if found := re.search(pattern, line):
                    yield f"{file.relative_to(root)}:{number} says {found[0]!r}: {why}"


def _matching(folder: Path, pattern: str, deep: bool) -> Iterator[Path]:
    return folder.rglob(pattern) if deep else folder.glob(pattern)


def only_the_product_is_installed(root: Path) -> Iterator[str]:
    config = tomllib.loads((root / "pyproject.toml").read_text())
    where = config["tool"]["setuptools"]["packages"]["find"]
    found = set(PEP420PackageFinder.find(str(root), include=where["include"], exclude=where.get("exclude", ())))
    for package in sorted(found):
        if package.partition(".")[0] not in PRODUCT:
            yield f"{package} would be installed; only {', '.join(PRODUCT)} are the product"
    for source in sources(root):
        package = ".".join(Path(source.path).parent.parts)
        if package not in found:
            yield f"{source.path} would not be installed: no pattern of pyproject.toml finds {package}"


def nothing_but_the_product_and_tests_has_code(root: Path) -> Iterator[str]:
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        generated = folder.name in ("build", "dist") or folder.name.endswith(".egg-info")
        if folder.name not in (*PRODUCT, "tests") and not generated and any(folder.rglob("*.py")):
            yield f"{folder.name}/ holds Python files and is none of {', '.join(PRODUCT)}, tests"


RULES: dict[Callable[[Path], Iterator[str]], tuple[str, ...]] = {  # rule -> what it must say of the planted tree
    folders_import_downwards: (
        "hashring/a.py:1 imports ps.errors; hashring may import nothing of ours",
        "ps/store.py:1 imports router.x; ps may import hashring",
        "ps/store.py:5 imports tests.conftest",
    ),
    router_takes_exported_names_only: (
        "router/x.py:1 takes Store from ps.store",
        "router/x.py:5 uses ps.secret",
        "router/x.py:3 takes wire",
    ),
    ps_imports_downwards: (
        "ps/store.py:2 imports ps.cluster, which lies above ps.store",
        "ps/store.py:3 imports connect from ps;",
        "ps/stray.py is in no layer",
    ),
    imports_have_no_cycle: ("ps.cluster -> ps.store -> ps.cluster",),
    third_parties_stay_inside_their_fences: (
        "ps/store.py:4 imports ray",
        "router/x.py:2 imports grpc",
        "hashring/a.py:2 imports torch",
        "hashring/a.py:3 imports pandas; hashring may import numba, numpy, uhashring",
    ),
    third_parties_are_declared: ("hashring/a.py:3 imports pandas, which is no dependency",),
    files_are_short: ("ps/cluster.py has 501 lines",),
    functions_are_short: ("hashring/a.py:4 function long has 71 lines",),
    nothing_banned_is_said: (
        "ps/stray.py:1 says 'TODO'",
        "tests/t.py:1 says 'parallel=True'",
        "README.md:1 says '/home/s'",
    ),
    only_the_product_is_installed: ("tests would be installed", "dense_head/m.py would not be installed"),
    nothing_but_the_product_and_tests_has_code: ("scripts/ holds Python files",),
}

PLANTED = {
    "hashring/a.py": "import ps.errors\nimport torch\nimport pandas\ndef long():\n" + "    pass\n" * 70,
    "ps/__init__.py": "__all__ = ['connect']\n",
    "ps/store.py": (
        "import router.x\nfrom ps import cluster\nfrom ps import connect\ndef f(): import ray\nimport tests.conftest\n"
    ),
    "ps/cluster.py": "from .store import Store\n" + "\n" * 500,
    "ps/stray.py": "# TODO: later\n",
    "router/x.py": "from ps.store import Store\nimport grpc\nimport ps.wire\nps.connect\nps.secret\n",
    "dense_head/m.py": "",
    "scripts/s.py": "",
    "tests/t.py": "parallel=True\n",
    "README.md": "see " + "/home" + "/someone/embring\n",
    "pyproject.toml": """
[project]
dependencies = ["numpy>=2", "torch", "grpcio>=1.68", "ray[default]>=2.50"]
[tool.setuptools.packages.find]
include = ["ps*", "router*", "hashring*", "tests*"]
""",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule: Callable[[Path], Iterator[str]]) -> None:
    broken = list(rule(ROOT))
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_finds_what_breaks_it(rule: Callable[[Path], Iterator[str]], tmp_path: Path) -> None:
    for name, text in PLANTED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    said = "\n".join(rule(tmp_path))
    for expected in RULES[rule]:
        assert expected in said


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("ps", {"ray", "grpc", "torch"}),
        ("ps.client", {"ray", "grpc", "torch"}),
        ("hashring.planner", {"ray", "grpc", "torch", "ps"}),
        ("dense_head", {"ray", "grpc", "ps"}),
        ("deploy.cli", {"ray", "grpc", "torch", "numba"}),
    ],
)
def test_importing_needs_little(module: str, unneeded: set[str]) -> None:
    script = f"import sys, {module}; print(*sorted({unneeded!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [], f"import {module} loads {run.stdout.strip()}"
