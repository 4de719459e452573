"""Who imports whom in `mobileformer` and `mf_kernels`: no circle, and between rooms the arrows of docs/design.md alone.

A room is a folder or a file right below a package. Type hints and imports inside functions count. The page declares the
arrows in a fenced block after a line "Arrows of `<package>`:", one room a line:

    room -> room room room

`python tests/test_arrows.py` prints the blocks as they are in the code.
"""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mobileformer", "mf_kernels")
Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted names of every file of both packages; a package is called as its folder."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


class Imports:
    """What each file of a checkout imports, under the names of the files where the imported names live."""

    def __init__(self, root: Path) -> None:
        self.files = modules(root)
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}
        # What the door of a package hands on: `from mobileformer import Model` is an arrow to where Model lives
        self.handed_on = {
            (door, alias.asname or alias.name): f"{node.module}.{alias.name}"
            for door in self.files
            if self.is_door(door)
            for node in ast.walk(self.trees[door])
            if isinstance(node, ast.ImportFrom) and node.module and not node.level
            for alias in node.names
        }

    def is_door(self, name: str) -> bool:
        return self.files[name].name == "__init__.py"

    def home(self, dotted: str) -> str | None:
        """The file that a dotted name is in; None for what is not ours."""
        if dotted in self.files:
            return dotted
        door, _, name = dotted.rpartition(".")
        if not door:
            return None
        if (door, name) in self.handed_on:
            return self.home(self.handed_on[door, name])
        return self.home(door)

    @functools.cache  # noqa: B019 a test's few objects live as long as its process
    def dotted_names(self, module: str) -> frozenset[str]:
        """Everything that a file imports, and what it takes of a package that it imported whole."""
        package = module if self.is_door(module) else module.rpartition(".")[0]
        found: set[str] = set()
        whole: set[str] = set()
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
                whole |= {alias.name for alias in node.names if alias.name in PACKAGES}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                found |= {f"{base}.{alias.name}" for alias in node.names}
        for node in ast.walk(self.trees[module]) if whole else ():
            chain = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if re.fullmatch(r"\w+(\.\w+)+", chain) and chain.partition(".")[0] in whole:
                found.add(chain)
        return frozenset(found)

    def missing(self, module: str) -> set[str]:
        """What a file imports from one of ours that has no such name: an import inside a function fails at its call."""
        found = set()
        for name in self.dotted_names(module):
            door, _, last = name.rpartition(".")
            if name.partition(".")[0] in PACKAGES and name not in self.files and door in self.files:
                tree = self.trees[door]
                names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
                names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
                names |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
                names |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
                if last not in names and not last.startswith("__"):
                    found.add(name)
        return found

    def between_files(self) -> Graph:
        graph: Graph = {}
        for module in self.files:
            homes = {self.home(name) for name in self.dotted_names(module)} - {None, module}
            # To import a file, Python runs the doors of the folders that it is in: no choice of who wrote it
            graph[module] = {h for h in homes if h and not (self.is_door(h) and module.startswith(f"{h}."))}
        return graph


def room(module: str) -> str:
    """`weights` of mobileformer.weights.keys; the packages' own doors are in none."""
    return module.split(".")[1] if "." in module else ""


def between_rooms(graph: Graph, package: str) -> Graph:
    rooms: Graph = {room(name): set() for name in graph if name.startswith(f"{package}.")}
    for module, targets in graph.items():
        for target in targets:
            if module.startswith(f"{package}.") and target.startswith(f"{package}.") and room(module) != room(target):
                rooms[room(module)].add(room(target))
    return rooms


def circle(graph: Graph) -> list[str]:
    """One way from a node back to itself, empty where there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := walk(target, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def declared(text: str, package: str) -> Graph:
    """The fenced block after "Arrows of `package`:" of a page."""
    block = re.search(rf"^.*[Aa]rrows of `{package}`:\n+```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block, f"docs/design.md: no fenced block after a line that ends with: arrows of `{package}`:"
    graph: Graph = {}
    for line in block[1].splitlines():
        name, arrow, targets = line.partition("->")
        assert arrow, f"docs/design.md: expected 'room -> room room', got {line!r}"
        graph.setdefault(name.strip(), set()).update(targets.split())
    return graph


def difference(page: Graph, code: Graph) -> list[str]:
    """What the page does not say, and what it says of nothing."""
    pairs = [{(a, b) for a, targets in graph.items() for b in targets} for graph in (page, code)]
    new = [f"{a} -> {b}: in the code and not on the page" for a, b in sorted(pairs[1] - pairs[0])]
    gone = [f"{a} -> {b}: on the page and not in the code" for a, b in sorted(pairs[0] - pairs[1])]
    return new + gone


def as_block(graph: Graph) -> str:
    rows = [f"{name} -> {' '.join(sorted(targets))}" for name, targets in sorted(graph.items()) if targets]
    return "\n".join(rows)


IMPORTS = Imports(ROOT)


def test_no_circle_between_files() -> None:
    assert not circle(IMPORTS.between_files())


def test_every_imported_name_is_there() -> None:
    missing = {module: found for module in IMPORTS.files if (found := IMPORTS.missing(module))}
    assert missing == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_arrows_between_rooms_are_those_of_the_page(package: str) -> None:
    rooms = between_rooms(IMPORTS.between_files(), package)
    assert not circle(rooms)
    assert difference(declared((ROOT / "docs" / "design.md").read_text(), package), rooms) == []


def test_the_kernels_know_nothing_of_the_model_which_uses_their_public_names() -> None:
    for module in IMPORTS.files:
        for name in IMPORTS.dotted_names(module):
            if module.startswith("mf_kernels"):
                assert name.partition(".")[0] != "mobileformer", f"{module} imports {name}"
            elif name.startswith("mf_kernels."):
                private = [part for part in name.split(".") if part.startswith("_")]
                assert not private, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("from mobileformer.high.b import f", "from mobileformer.low.a import g"),
        ("def late():\n    from mobileformer.high import b", "from mobileformer.low.a import g"),
        ("if TYPE_CHECKING:\n    from mobileformer import f", "from mobileformer.low.a import g"),
        ("import mobileformer\nmobileformer.f()", "from ..low import a"),
        ("import mobileformer.high.b", "from mobileformer.low import g"),
    ],
)
def test_a_circle_is_found_however_it_is_written(tmp_path: Path, low: str, high: str) -> None:
    files = {
        "mobileformer/__init__.py": "if TYPE_CHECKING:\n    from mobileformer.high.b import f as f",
        "mobileformer/low/__init__.py": "from mobileformer.low.a import g as g",
        "mobileformer/low/a.py": low,
        "mobileformer/high/__init__.py": "",
        "mobileformer/high/b.py": high,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = Imports(tmp_path).between_files()
    assert circle(graph) == ["mobileformer.high.b", "mobileformer.low.a", "mobileformer.high.b"]
    assert circle(between_rooms(graph, "mobileformer")) == ["high", "low", "high"]
    (tmp_path / "mobileformer/low/a.py").write_text("import json")
    assert not circle(Imports(tmp_path).between_files())


def test_the_page_is_held_to_the_code_both_ways() -> None:
    page = textwrap.dedent(
        """
        Arrows of `mobileformer`:

        ```
        a -> b c
        b -> c
        ```
        """
    )
    assert difference(declared(page, "mobileformer"), {"a": {"b"}, "b": {"c", "d"}}) == [
        "b -> d: in the code and not on the page",
        "a -> c: on the page and not in the code",
    ]


if __name__ == "__main__":
    for package in PACKAGES:
        print(f"Arrows of `{package}`:\n\n```\n{as_block(between_rooms(IMPORTS.between_files(), package))}\n```\n")
