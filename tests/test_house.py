"""Rules of the code base that a machine can check."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fgpt_hf"
# A wing imports only itself and wings before it.
ORDER = (
    *("errors", "wording", "parsing", "files", "retries", "workers", "config", "tokenizer", "model", "data", "losses"),
    *("convert", "runtime", "evaluation", "training", "report", "ablation", "hub", "chat", "cli"),
)


def modules() -> dict[str, Path]:
    """Return the package's modules by dotted name below `fgpt_hf`, less the metrics, which are published alone."""
    paths = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    return {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): PACKAGE / path
        for path in paths
        if path.parts[0] not in ("metrics", "__init__.py", "__main__.py")
    }


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, anywhere in it, by dotted name below `fgpt_hf`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        package = ".".join(path.relative_to(PACKAGE).parent.parts) if node.level else ""
        module = node.module or ""
        if node.level:
            found |= {".".join(filter(None, (package, module)))}
        elif module.split(".")[0] == "fgpt_hf":
            below = module.partition(".")[2]
            names = {f"{below}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in modules() else below for name in names} - {""}
    return found


def test_each_wing_imports_only_wings_before_it() -> None:
    for name, path in modules().items():
        wing = name.split(".")[0]
        used = {module.split(".")[0] for module in imports(path)} - {"metrics"}
        assert used <= set(ORDER[: ORDER.index(wing) + 1]), name


def test_no_module_imports_itself_through_others() -> None:
    arrows = {name: imports(path) for name, path in modules().items()}
    while leaves := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows


def test_metrics_stand_alone() -> None:
    """Each is published as a folder of its own."""
    assert not set().union(*(imports(path) for path in PACKAGE.glob("metrics/*/*.py")))


def test_the_loop_knows_no_corpus_and_no_benchmark() -> None:
    assert not {"evaluation", "metrics"} & {name.split(".")[0] for name in imports(PACKAGE / "training" / "trainer.py")}


def test_the_package_has_few_rooms() -> None:
    rooms = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != "_")]
    assert len(rooms) < 25
