"""`fgpt publish`."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from fgpt_hf.config.options import Limits

if TYPE_CHECKING:
    from fgpt_hf.hub.card_options import CardOptions
    from fgpt_hf.hub.upload import Destination


Folder = Annotated[Path, Argument(metavar="MODEL", help="Folder of a model or a run.")]
RepoId = Annotated[str, Argument(metavar="REPO_ID", help="Repo on the Hub: user/name or organization/name.")]
DryRun = Annotated[
    bool, Option("--dry_run", help="List the files that would be uploaded, with their sizes, and upload nothing.")
]
Private = Annotated[bool, Option("--private", help="Make a new repo private.")]
Revision = Annotated[str | None, Option("--revision", help="Branch, created if it does not exist (default: main).")]
Tag = Annotated[str | None, Option("--tag", help="Tag for the commit, such as v1.0 (default: none).")]
Architecture = Annotated[
    Literal["fgpt", "auto", "gpt2", "llama", "qwen3", "arcee", "nanochat"],
    Option(
        "--as",
        help="Architecture to publish as: fgpt with its code, or auto, the class of transformers that "
        "computes the same and needs no remote code; the others are such classes by name.",
    ),
]
Gguf = Annotated[
    list[str] | None,
    Option(
        "--gguf",
        metavar="TYPE",
        help="Also publish a GGUF file, for llama.cpp and Ollama, with weights of this type: F32, F16, "
        "BF16, Q8_0 or Q4_0; may be repeated.",
    ),
]
License = Annotated[str | None, Option("--license", help="For the card: license of the weights, such as mit.")]
Language = Annotated[str | None, Option("--language", help="For the card: language of the data, such as en.")]
BaseModel = Annotated[
    str | None, Option("--base_model", help="For the card: Hub id of the model that this one was trained from.")
]
Space = Annotated[
    str | None, Option("--space", help="Also create or update this Space, user/name, to serve the model.")
]
StaticSpace = Annotated[
    str | None,
    Option(
        "--static_space",
        help="Also create or update this Space, user/name, a page without a server that runs the model in the browser.",
    ),
]
DollarsPerHour = Annotated[
    float | None, Option("--dollars_per_hour", help="For the card: price of one device, in dollars per hour.")
]
Watts = Annotated[float | None, Option("--watts", help="For the card: power of one device, in watts.")]


def publish(
    model: Folder,
    repo_id: RepoId,
    dry_run: DryRun = False,
    private: Private = False,
    revision: Revision = None,
    tag: Tag = None,
    architecture: Architecture = "fgpt",
    gguf: Gguf = None,
    license: License = None,
    language: Language = None,
    base_model: BaseModel = None,
    space: Space = None,
    static_space: StaticSpace = None,
    dollars_per_hour: DollarsPerHour = None,
    watts: Watts = None,
) -> None:
    """Publish a model on the Hub, and a Space that serves it.

    Example: fgpt publish runs/mine user/name --as auto --gguf Q8_0 --license mit
    """
    Limits().check("dollars_per_hour", dollars_per_hour)
    Limits().check("watts", watts)
    from fgpt_hf.hub.card_options import CardOptions
    from fgpt_hf.hub.upload import Destination, check_name

    for name in (repo_id, space, static_space):
        if name is not None:
            check_name(name)
    destination = Destination(repo_id=repo_id, private=private, revision=revision, tag=tag)
    card = CardOptions(
        architecture=architecture,
        gguf=tuple(gguf or ()),
        license=license,
        language=language,
        base_model=base_model,
        space=space,
        dollars_per_hour=dollars_per_hour,
        watts=watts,
    )
    show_or_publish = _list_files if dry_run else _publish
    show_or_publish(model, destination, card, static_space)


def _list_files(model: Path, destination: "Destination", card: "CardOptions", static_space: str | None) -> None:
    from fgpt_hf.hub.publish import files_to_publish, size_table
    from fgpt_hf.hub.space import planned_files
    from fgpt_hf.hub.static_space import static_space_files

    with files_to_publish(model, destination, card) as files:
        print(size_table(files))
        if card.space:
            print(f"\nand to its Space {card.space}")
            print(size_table(planned_files(model, destination, card, files)))
    if static_space:
        with static_space_files(model, static_space, destination.repo_id) as files:
            print(f"\nand to its page {static_space}")
            print(size_table(files))


def _publish(model: Path, destination: "Destination", card: "CardOptions", static_space: str | None) -> None:
    from fgpt_hf.hub.publish import publish as publish_model
    from fgpt_hf.hub.space import publish_with_space
    from fgpt_hf.hub.static_space import push_static_space, static_space_files

    repo_id = destination.repo_id
    with ExitStack() as made:
        # The page is made first: nothing is published if it cannot be.
        page = made.enter_context(static_space_files(model, static_space, repo_id)) if static_space else {}
        if card.space:
            model_url, space_url = publish_with_space(model, destination, card)
            print(f"published: {model_url}\nits Space: {space_url}")
        else:
            print(f"published: {publish_model(model, destination, card)}")
        if static_space:
            print(f"its page: {push_static_space(page, static_space, repo_id, destination.private)}")
