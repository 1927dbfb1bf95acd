"""The rules of the layout: which module may import which, and how long a function may be."""

import ast
from functools import cache
from pathlib import Path

from helpers import ROOT

PACKAGES = {  # lowest first: a package imports those before it
    "dalle_pytorch": ROOT / "DALLE-pytorch/dalle_pytorch",
    "diffusion": ROOT / "diffusion",
    "text_to_image": ROOT / "text_to_image",
}
COMMAND_LINE = (  # these may parse and print
    "dalle_pytorch.cli", "dalle_pytorch.settings", "dalle_pytorch.training.settings", "dalle_pytorch.training.commands",
    "text_to_image.commands", "text_to_image.settings", "text_to_image.__main__",
)  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name; a package's own name is its `__init__.py`."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(path: Path) -> set[str]:
    """What a file imports, inside functions and for type checkers too; of our packages the modules alone."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules() else node.module)
    return found


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path of names that ends where it began; empty if there is none."""
    finished, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        path.append(name)
        found = next(filter(None, map(visit, sorted(graph.get(name, ())))), [])
        path.pop()
        finished.add(name)
        return found

    return next(filter(None, map(visit, sorted(graph))), [])


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_by_way_of_others():
    # What a package's __init__ offers is left out: it names the modules below it.
    plain = {name: path for name, path in modules().items() if path.name != "__init__.py"}
    assert circle({name: imported(path) & plain.keys() for name, path in plain.items()}) == []


def test_packages_import_downwards():
    order = list(PACKAGES)
    for name, path in modules().items():
        above = tuple(order[order.index(name.split(".")[0]) + 1 :])
        assert [other for other in imported(path) if inside(other, above)] == [], path


def test_files_know_no_model():
    wanted = [name for name in modules() if inside(name, ("dalle_pytorch.files",))]
    allowed = ("dalle_pytorch.files", "dalle_pytorch.errors")
    for name in wanted:
        ours = {other for other in imported(modules()[name]) if inside(other, tuple(PACKAGES))}
        assert {other for other in ours if not inside(other, allowed)} == set(), name
        assert not imported(modules()[name]) & {"torch.nn", "transformers", "diffusers"}, name
    assert wanted


def test_the_drawn_world_is_nobodys_business():
    scenes = ("dalle_pytorch.scenes",)
    for name, path in modules().items():
        if not inside(name, scenes):
            assert [other for other in imported(path) if inside(other, scenes)] == [], path


def test_packages_neither_print_nor_parse_arguments():
    for name, path in modules().items():
        if inside(name, COMMAND_LINE):
            continue
        assert not imported(path) & {"argparse", "jsonargparse"}, path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"


def test_no_function_is_over_100_lines():
    folders = (
        ROOT / name for name in ("DALLE-pytorch", "benchmarks", "diffusion", "examples", "models", "text_to_image")
    )
    for path in (*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{path}:{node.lineno}: {node.name}"
