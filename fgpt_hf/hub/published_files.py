"""Choose the files of a folder that may be published, and check that they are whole and lie in that folder."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fgpt_hf.errors import UserError
from fgpt_hf.files import read_json
from fgpt_hf.model.own_code import CODE

INDEX = "model.safetensors.index.json"
WEIGHTS_AND_CODE = (
    "model*.safetensors",
    INDEX,
    "adapter_model.safetensors",
    "adapter_config.json",
    *CODE,
)
# Nothing else is published: no optimizer state, no token files, no logs, no pickles. A star stands for no slash.
PUBLISHED = (
    "README.md",
    "LICENSE",
    "config.json",
    "generation_config.json",
    *WEIGHTS_AND_CODE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "figures/*.png",
    ".eval_results/*.yaml",
)
Content = Path | bytes
Files = Mapping[str, Content]


def publishable(folder: Path) -> dict[str, Content]:
    """Return the files of a folder that may be published, by their path in the repo.

    Raises:
        UserError: one of them is a link, is damaged, or is missing although an index names it.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in paths.items() if matches(name, PUBLISHED) and not path.is_dir()}
    refuse_links(folder, files.values())
    for path in files.values():
        _check_content(path)
    return dict(files)


def refuse_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raise UserError if one of these paths below a folder is a symbolic link, or lies in a folder that is one.

    A link could publish any file of the machine.
    """
    for path in paths:
        for part in (path, *path.parents):
            if part == folder:
                break
            if part.is_symlink():
                raise UserError(
                    f"{part} is a link to {part.readlink()}, and publish follows none: put a copy in its place, or "
                    "delete it"
                )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a path has one of these forms, in which a star stands for no slash.

    Example:
        >>> matches("figures/loss.png", ["figures/*.png"]), matches("figures/old/loss.png", ["figures/*.png"])
        (True, False)
    """
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _check_content(path: Path) -> None:
    """Raise UserError if a file is not what its name says; of weights, the header and every length are compared."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    elif path.suffix == ".json":
        content = read_json(path)
        if path.name == INDEX:
            _check_shards(path, content.get("weight_map"))


def _check_shards(index: Path, shards: object) -> None:
    if not isinstance(shards, Mapping) or not shards:
        raise UserError(f"{index} is damaged: it should say in weight_map which file holds which weight")
    for weight, name in shards.items():
        if Path(str(name)).name != name:
            raise UserError(f"{index} is damaged: {str(name)[:80]!r} is not the name of a file next to it")
        file = index.with_name(name)
        if not file.is_file():
            raise UserError(f"{file} is missing, which holds {weight} by {index.name}")
