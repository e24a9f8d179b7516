"""The house rules that a machine can check."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fgpt_hf"
# A module may import only modules of an earlier line; `cli` may import any.
ORDER = [
    {"configuration_fgpt"},
    {"modeling_fgpt"},
    {"weights"},
    {"loading", "trees"},
    {"tokenizer"},
    {"runs"},
    {"presets", "command_line"},
    {"workers", "retries", "packing"},
    {"pydocs", "sources"},
    {"corpora"},
    {"pydocs_choice", "pydocs_chat"},
    {"pydocs_preference", "conversations"},
    {"pairs"},
    {"tasks"},
    {"boundaries"},
    {"dialogue"},
    {"windows"},
    {"rows"},
    {"batches"},
    {"chat_rows", "pair_rows"},
    {"objectives"},
    {"preference"},
    {"scoring"},
    {"reference"},
    {"answers"},
    {"hardware"},
    {"optim"},
    {"devices", "lora"},
    {"estimate"},
    {"forecast"},
    {"folders"},
    {"prepared"},
    {"preparation"},
    {"data"},
    {"provenance"},
    {"checkpoints"},
    {"shortage"},
    {"processes"},
    {"training"},
    {"evaluation"},
    {"results", "replies"},
    {"chat"},
    {"report"},
    {"llamacpp"},
    {"interop"},
    {"tuning"},
    {"facts"},
    {"card_results"},
    {"evaluate_command"},
    {"card_sections"},
    {"card"},
    {"hub"},
    {"publish"},
    {"space"},
    {"cli"},
]


def imports(path: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fgpt_hf"):
            found.add(node.module.partition(".")[2].split(".")[0] or "__init__")
    return found


def test_every_module_imports_only_modules_above_it() -> None:
    above: set[str] = {"metrics"}  # which stand alone
    for line in ORDER:
        for module in line:
            assert imports(PACKAGE / f"{module}.py") <= above, module
        above |= line


def test_every_module_has_its_place() -> None:
    placed = set().union(*ORDER) | {"__init__"}
    assert {path.stem for path in PACKAGE.glob("*.py")} <= placed


def test_metrics_stand_alone() -> None:
    """Each is published as a folder of its own."""
    assert not set().union(*(imports(path) for path in PACKAGE.glob("metrics/*/*.py")))


def test_training_knows_no_corpus_and_no_metric() -> None:
    assert not imports(PACKAGE / "training.py") & {"corpora", "pydocs", "data", "evaluation", "tasks", "metrics"}
