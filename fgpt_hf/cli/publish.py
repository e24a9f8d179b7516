"""`fgpt publish`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

if TYPE_CHECKING:
    from fgpt_hf.hub.card import CardOptions
    from fgpt_hf.hub.upload import Destination


def publish(
    model: Annotated[Path, Argument(metavar="MODEL", help="Folder of a model or a run.")],
    repo_id: Annotated[str, Argument(metavar="REPO_ID", help="Repo on the Hub: user/name or organization/name.")],
    dry_run: Annotated[bool, Option("--dry_run", help="Only list the files that would go, with their sizes.")] = False,
    private: Annotated[bool, Option("--private", help="Make a new repo private.")] = False,
    revision: Annotated[
        str | None, Option("--revision", help="Branch, created where it does not exist (default: main).")
    ] = None,
    tag: Annotated[str | None, Option("--tag", help="Tag for the commit, such as v1.0.")] = None,
    variant: Annotated[
        Literal["fgpt", "gpt2"], Option("--as", help="Architecture to publish as; gpt2 needs no remote code.")
    ] = "fgpt",
    license: Annotated[str | None, Option("--license", help="For the card: license, such as mit.")] = None,
    language: Annotated[str | None, Option("--language", help="For the card: language, such as en.")] = None,
    base_model: Annotated[
        str | None, Option("--base_model", help="For the card: Hub id of the model that this one was trained from.")
    ] = None,
    space: Annotated[
        str | None, Option("--space", help="Also create or update this Space, user/name, to serve the model.")
    ] = None,
    dollars_per_hour: Annotated[
        float | None, Option("--dollars_per_hour", help="For the card: price of one device, in dollars per hour.")
    ] = None,
    watts: Annotated[float | None, Option("--watts", help="For the card: power of one device, in watts.")] = None,
) -> None:
    """Publish a model on the Hub, and a Space that serves it.

    Example: fgpt publish runs/mine user/name --space user/name --license mit
    """
    from fgpt_hf.hub.card import CardOptions
    from fgpt_hf.hub.upload import Destination

    card = CardOptions(
        stock=variant == "gpt2",
        license=license,
        language=language,
        base_model=base_model,
        space=space,
        dollars_per_hour=dollars_per_hour,
        watts=watts,
    )
    destination = Destination(repo_id=repo_id, private=private, revision=revision, tag=tag)
    if dry_run:
        _list_files(model, destination, card)
    else:
        _publish(model, destination, card)


def _list_files(model: Path, destination: "Destination", card: "CardOptions") -> None:
    from fgpt_hf.hub.publish import files_to_publish, size_table
    from fgpt_hf.hub.space import planned_files

    with files_to_publish(model, destination, card) as files:
        print(size_table(files))
        if card.space:
            print(f"\nand to its Space {card.space}")
            print(size_table(planned_files(model, destination, card, files)))


def _publish(model: Path, destination: "Destination", card: "CardOptions") -> None:
    from fgpt_hf.hub.publish import publish as publish_model
    from fgpt_hf.hub.space import publish_with_space

    if card.space:
        model_url, space_url = publish_with_space(model, destination, card)
        print(f"published: {model_url}\nits Space: {space_url}")
    else:
        print(f"published: {publish_model(model, destination, card)}")
