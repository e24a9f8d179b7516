"""Import every module of the package and of the Space: `python tests/support/import_all.py`.

Where only the package's own dependencies are installed, this shows that no module needs an optional one.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = {
    "fgpt_hf.convert.gguf": "gguf",
    "fgpt_hf.convert.gguf_rope": "gguf",
    "fgpt_hf.convert.onnx": "onnx_ir",
    "fgpt_hf.evaluation.harness": "lm_eval",
}  # modules that a command imports when their extra is there


def module_names() -> list[str]:
    """Return the names of all modules, without the metrics' demos (they start a server) and the Space's main file."""
    package = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "fgpt_hf").rglob("*.py")]
    space = [path.relative_to(ROOT / "space").with_suffix("") for path in (ROOT / "space").glob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in [*package, *space] if path.name != "app"}
    return sorted(names - {"fgpt_hf.__main__"})


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "space")]
    missing = {module for module, needed in OPTIONAL.items() if importlib.util.find_spec(needed) is None}
    names = [name for name in module_names() if name not in missing]
    for name in names:
        importlib.import_module(name)
    print(f"{len(names)} modules imported")


if __name__ == "__main__":
    main()
