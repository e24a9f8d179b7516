"""Import every module of the package and of the Space, and ask every command for its help.

`python tests/support/import_all.py`: where only the package's own dependencies are installed, this shows that none of
it needs an optional one.
"""

import importlib
import importlib.util
import io
import sys
from contextlib import redirect_stdout, suppress
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
    from fgpt_hf.cli.main import COMMANDS, run
    from fgpt_hf.errors import UserError

    for command in COMMANDS:
        # The options of lm-eval are those of a package that may be missing: its help says that, and which.
        expected = (SystemExit, UserError) if command == "lm-eval" else SystemExit
        with redirect_stdout(io.StringIO()) as shown, suppress(expected):
            run([command, "--help"])
        assert "Example: " in shown.getvalue(), command
    print(f"{len(COMMANDS)} commands have help")


if __name__ == "__main__":
    main()
