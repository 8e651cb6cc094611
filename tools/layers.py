"""The import contract: which part of the project may import which.

    python tools/layers.py             check the contract; exit code 1 names every violation
    python tools/layers.py --diagram   print the diagram of ARCHITECTURE.md
    python tools/layers.py --figures   print sizes and counts

A module may import its own layer's parts only where they are written together below, and every layer under it. The
contract covers all imports, also those inside functions and those for type checkers. Further rules: no two modules
import each other, directly or through others; no private name (`_name`) is used outside its module; no module-level
constant is assigned twice.
"""

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("xlam_jax", "converters", "serving")

LAYERS: list[tuple[str, str, list[str]]] = [
    ("top", "weights and trajectories to other formats; the server", ["converters", "serving"]),
    (
        "commands",
        "what users start, and its parts",
        [
            "xlam_jax.launch",
            "xlam_jax.train",
            "xlam_jax.generate",
            "xlam_jax.plan",
            "xlam_jax.export",
            "xlam_jax.data.__main__",
            "xlam_jax.evaluate.__main__",
            "xlam_jax.report.__main__",
        ],
    ),
    ("reports", "reports of runs; memory and time of planned ones", ["xlam_jax.report", "xlam_jax.planning"]),
    ("training", "losses, steps, checkpoints, the loop", ["xlam_jax.training"]),
    ("evaluate", "benchmarks, agents, judges", ["xlam_jax.evaluate"]),
    ("client", "requests to OpenAI-compatible servers", ["xlam_jax.client"]),
    ("data and weights", "trajectories to batches; weights in files", ["xlam_jax.data", "xlam_jax.weights"]),
    ("config", "what a run is asked to do", ["xlam_jax.config"]),
    ("models", "decoders, kernels, generation", ["xlam_jax.models"]),
    ("parallel", "meshes and hosts", ["xlam_jax.parallel"]),
    ("pages", "templates and plots", ["xlam_jax.pages"]),
    ("base", "errors, files, journals, progress", ["xlam_jax"]),
]
"""Highest first: name, purpose, parts. A module belongs to the longest part that its name begins with."""

MAY_IMPORT_EACH_OTHER = {"commands", "base"}
"""Layers whose parts are single modules. In the other layers, parts do not import each other."""


class Import(NamedTuple):
    """One import statement."""

    importer: str
    imported: str
    line: int
    lazy: bool
    """Whether it is inside a function."""


class Violation(NamedTuple):
    """A broken rule, and where."""

    rule: str
    where: str
    what: str


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Module name → file, of all packages."""
    paths = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    names = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def part_of(module: str) -> tuple[int, str]:
    """The layer (0: highest) and part of a module."""
    fits = [
        (len(part), index, part)
        for index, (_, _, parts) in enumerate(LAYERS)
        for part in parts
        if module == part or module.startswith(f"{part}.")
    ]
    _, index, part = max(fits)
    return index, part


def imports(module: str, tree: ast.Module, paths: dict[str, Path]) -> Iterator[Import]:
    """Yields the imports of the project's own modules."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, functions) for node in ast.walk(function)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in paths else node.module for name in full]
        for name in dict.fromkeys(names):
            if name in paths and name != module:
                yield Import(module, name, getattr(node, "lineno", 0), id(node) in inside)


def upward(all_imports: list[Import]) -> Iterator[Violation]:
    """Yields imports of a higher layer, or of another part of the same one."""
    for one in all_imports:
        (layer, part), (other_layer, other_part) = part_of(one.importer), part_of(one.imported)
        same = layer == other_layer and part != other_part and LAYERS[layer][0] not in MAY_IMPORT_EACH_OTHER
        if other_layer < layer or same:
            yield Violation("upward import", f"{one.importer}:{one.line}", f"imports {one.imported}")


def cycles(all_imports: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    graph: dict[str, set[str]] = defaultdict(set)
    for one in all_imports:
        graph[one.importer].add(one.imported)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return groups


def private_names(module: str, tree: ast.Module, paths: dict[str, Path]) -> Iterator[Violation]:
    """Yields uses of another module's private names."""
    aliases: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                is_module = f"{node.module}.{alias.name}" in paths
                if is_module:
                    aliases.add(alias.asname or alias.name)
                elif alias.name.startswith("_"):
                    yield Violation("private name", f"{module}:{node.lineno}", f"imports {node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.attr
            if node.value.id in aliases and name.startswith("_") and not name.startswith("__"):
                yield Violation("private name", f"{module}:{node.lineno}", f"uses {node.value.id}.{name}")


def redefined(module: str, tree: ast.Module) -> Iterator[Violation]:
    """Yields module-level constants that are assigned twice: the second assignment wins silently."""
    lines: dict[str, int] = {}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper():
                if target.id in lines:
                    what = f"assigns {target.id} again, after line {lines[target.id]}"
                    yield Violation("redefined constant", f"{module}:{node.lineno}", what)
                lines[target.id] = node.lineno


def violations(root: Path = ROOT) -> list[Violation]:
    """Everything that breaks the contract."""
    paths = modules(root)
    trees = {name: ast.parse(path.read_bytes()) for name, path in paths.items()}
    all_imports = [one for name, tree in trees.items() for one in imports(name, tree, paths)]
    broken = list(upward(all_imports))
    broken += [
        Violation("cycle", group[0], "imports and is imported by " + ", ".join(group[1:]))
        for group in cycles(all_imports)
    ]
    for name, tree in trees.items():
        broken += [*private_names(name, tree, paths), *redefined(name, tree)]
    return broken


def diagram() -> str:
    """The layers as text, highest first."""
    shown = {"commands": "xlam_jax.{launch, train, generate, plan, export}, most __main__"}
    rows = [(name, shown.get(name, ", ".join(parts)), purpose) for name, purpose, parts in LAYERS]
    width = max(len(parts) for _, parts, _ in rows)
    return "\n".join(f"{name:<18}{parts:<{width}}  {purpose}" for name, parts, purpose in rows)


def figures(root: Path = ROOT) -> str:
    """Sizes and counts outside tests."""
    paths = modules(root)
    suffixes = (".py", ".jinja", ".css", ".js")
    files = [path for package in PACKAGES for path in (root / package).rglob("*") if path.suffix in suffixes]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    trees = {name: ast.parse(path.read_bytes()) for name, path in paths.items()}
    functions = [
        ((node.end_lineno or 0) - node.lineno + 1, f"{name}.{node.name}")
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    all_imports = [one for name, tree in trees.items() for one in imports(name, tree, paths)]
    across = [one for one in all_imports if one.lazy and part_of(one.importer) != part_of(one.imported)]
    private = [one for name, tree in trees.items() for one in private_names(name, tree, paths)]
    longest = max(lines, key=lambda path: lines[path])
    return "\n".join(
        f"{name}: {value}"
        for name, value in {
            "lines (.py, .jinja, .css, .js)": f"{sum(lines.values()):,} in {len(lines)} files",
            "longest function": "{} lines, {}".format(*max(functions)),
            "functions over 60 lines": sum(length > 60 for length, _ in functions),
            "longest file": f"{lines[longest]} lines, {longest.relative_to(root)}",
            "files over 500 lines": sum(count > 500 for count in lines.values()),
            "upward imports": len(list(upward(all_imports))),
            "cycles": len(cycles(all_imports)),
            "modules in cycles": sum(map(len, cycles(all_imports))),
            "lazy imports across layers": len(across),
            "private names across modules": len(private),
        }.items()
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python tools/layers.py", description="Checks which part imports which.")
    parser.add_argument("--diagram", action="store_true", help="print the layers")
    parser.add_argument("--figures", action="store_true", help="print sizes and counts")
    args = parser.parse_args()
    if args.diagram or args.figures:
        print(diagram() if args.diagram else figures())
        return
    broken = violations()
    for one in broken:
        print(f"{one.where}: {one.rule}: {one.what}")
    if broken:
        sys.exit(1)
    print(f"{len(modules())} modules keep the import contract")


if __name__ == "__main__":
    main()
