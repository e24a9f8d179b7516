"""`fgpt …`: what one does with a model or a run that is there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgpt_hf.cli.chat import add_chat
from fgpt_hf.cli.entry_point import command_line
from fgpt_hf.cli.evaluate import add_evaluate
from fgpt_hf.config.parser import Commands, flags, from_flags
from fgpt_hf.config.runs import Preparation
from fgpt_hf.data.prepare import prepare_documents
from fgpt_hf.errors import UserError
from fgpt_hf.report import report
from fgpt_hf.runtime.plan import estimate_command


def main() -> None:
    command_line(run)


def run(arguments: Sequence[str]) -> None:
    parser = Commands(prog="fgpt", description=__doc__)
    commands: Any = parser.add_subparsers(dest="command", required=True)
    a_run = commands.add_parser("report", help="figures, losses and samples of a run: fgpt report runs/quickstart/base")
    a_run.add_argument("run", type=Path)
    a_run.set_defaults(function=lambda options: print(report(options.run)))
    # No prefix makes a flag: all of them are those of a run, which `estimate` reads itself.
    plan = commands.add_parser(
        "estimate",
        prefix_chars=" ",
        add_help=False,
        help="memory, time and cost of a run before its first step: fgpt estimate --preset fgpt-712m --device h100",
    )
    plan.add_argument("flags", nargs="*")
    plan.set_defaults(function=lambda options: print(estimate_command(options.flags)))
    prepare = commands.add_parser(
        "prepare",
        parents=[flags(Preparation)],
        help="tokenise documents once: fgpt prepare --dataset_name fineweb-edu --output_dir data/fineweb-edu-10bt",
    )
    prepare.set_defaults(function=lambda options: print(prepare_documents(from_flags(Preparation, options))))
    _add_convert(commands)
    _add_export(commands)
    _add_publish(commands)
    add_evaluate(commands)
    add_chat(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}: fgpt {options.command} --help lists all of them")
    options.function(options)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert", help="others' weights as an FGPT model: fgpt convert weights.pth models/old"
    )
    parser.add_argument("source", help="a .pth of the original FGPT, nanoGPT's ckpt.pt, or a GPT-2: folder or Hub name")
    parser.add_argument("folder", type=Path, help="the model's new folder")
    parser.add_argument("--vocab_size", type=int, help="tokens (default: as many as there are, or 50304 if too few)")
    parser.add_argument("--num_attention_heads", type=int, help="heads, if they are not the original's 24 or recorded")
    parser.set_defaults(function=_convert)


def _convert(options: Any) -> None:
    from fgpt_hf.convert.convert import convert  # here and below: seconds that the other commands need not wait

    layout, model = convert(options.source, options.folder, options.vocab_size, options.num_attention_heads)
    print(f"{options.folder}: {model.num_parameters():,} parameters from the layout {layout}")


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help="for other programs: fgpt export runs/quickstart/base OUT --format gpt2"
    )
    parser.add_argument("model", help="a model's or a run's folder, or a name on the Hub")
    parser.add_argument("target", type=Path, help="a new folder, or for gguf a new file")
    parser.add_argument("--format", required=True, help="gpt2 (needs no remote code), gguf or onnx")
    parser.set_defaults(function=_export)


def _export(options: Any) -> None:
    from fgpt_hf.convert.export import export

    export(options.model, options.target, options.format)
    print(f"{options.target}: {options.model} as {options.format}")


def _add_publish(commands: Any) -> None:
    parser = commands.add_parser("publish", help="to the Hub, with a card: fgpt publish runs/quickstart/base user/name")
    parser.add_argument("model", type=Path, help="a model's or a run's folder")
    parser.add_argument("repo_id", help="user/name or organisation/name")
    parser.add_argument("--dry_run", action="store_true", help="show what would go, and how large it is")
    parser.add_argument("--private", action="store_true", help="make a new repo private")
    parser.add_argument("--revision", help="a branch (default: main), made if need be")
    parser.add_argument("--tag", help="a name for the commit, such as v1.0")
    parser.add_argument("--as", dest="variant", choices=("fgpt", "gpt2"), default="fgpt", help="gpt2: no remote code")
    parser.add_argument("--license", help="for the card: the weights' licence, such as mit")
    parser.add_argument("--language", help="for the card: the language of the data, such as en")
    parser.add_argument("--base_model", help="for the card: the model on the Hub that this one was trained from")
    parser.add_argument(
        "--space", help="user/name: make or update the Space that serves the model, which its card names"
    )
    parser.add_argument("--dollars_per_hour", type=float, help="for the card: what one device costs")
    parser.add_argument("--watts", type=float, help="for the card: what one device draws")
    parser.set_defaults(function=_publish)


def _publish(options: Any) -> None:
    from fgpt_hf.hub.card_sections import CardOptions
    from fgpt_hf.hub.publish import files_to_publish, listing, publish
    from fgpt_hf.hub.space import planned_files, publish_with_space
    from fgpt_hf.hub.upload import Destination

    said = ("license", "language", "base_model", "space", "dollars_per_hour", "watts")
    told = CardOptions(stock=options.variant == "gpt2", **{name: getattr(options, name) for name in said})
    where = ("repo_id", "private", "revision", "tag")
    destination = Destination(**{name: getattr(options, name) for name in where})
    if options.dry_run:
        with files_to_publish(options.model, destination, told) as files:
            print(listing(files))
            if told.space:
                print(f"\nand to its Space {told.space}")
                print(listing(planned_files(options.model, destination, told, files)))
    elif told.space:
        model, space = publish_with_space(options.model, destination, told)
        print(f"published: {model}\nits Space: {space}")
    else:
        print(f"published: {publish(options.model, destination, told)}")


if __name__ == "__main__":
    main()
