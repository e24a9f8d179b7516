"""`fgpt ablate`."""

from pathlib import Path
from typing import Annotated

from typer import Context, Option

from fgpt_hf.config.options import Limits

Vary = Annotated[
    list[str],
    Option(
        "--vary",
        metavar="FIELD=A,B,…",
        help="An option of train-base and the values to compare; the first one is the default's. Can be repeated; "
        "options that change together are joined by +, as in mlp=plain,gated+hidden_act=gelu,silu. Without it, "
        "the switches of the network are compared.",
    ),
]
LearningRates = Annotated[
    str,
    Option(
        "--learning_rates",
        metavar="A,B,…",
        help="Learning rates, each of which every variant is trained with (default: half the run's own, the run's own "
        "and twice that).",
    ),
]
Seeds = Annotated[int, Option("--seeds", help="Number of seeds that each variant's best rate is trained with.")]
EveryCombination = Annotated[
    bool,
    Option("--every_combination", help="Compare every combination of values, not each alone and all together."),
]
OutputDir = Annotated[Path, Option("--output_dir", metavar="FOLDER", help="Folder of runs, table and figure.")]
SWITCHES = (
    "position_embedding=learned,rope",
    "norm=layernorm,rmsnorm",
    "mlp=plain,gated+hidden_act=gelu_pytorch_tanh,silu",
    "attention_bias=true,false+mlp_bias=true,false",
    "qk_norm=false,true",
    "zero_init_residual=false,true",
)


def ablate(
    context: Context,
    vary: Vary = [],  # noqa: B006  # typer shows and copies it
    learning_rates: LearningRates = "",
    seeds: Seeds = 3,
    every_combination: EveryCombination = False,
    output_dir: OutputDir = Path("runs/ablation"),
) -> None:
    """Compare settings of base runs by their bits per byte.

    Each variant is trained at several learning rates, and its best one with several seeds. All other options are
    those of train-base, for every run; fgpt train-base --help lists them. The same command resumes a comparison
    that was interrupted.

    Example: fgpt ablate --preset quickstart --max_steps 100 --vary optim=muon,adamw
    """
    from fgpt_hf.ablation.table import draw_losses, markdown_table, summarize
    from fgpt_hf.ablation.trials import Ablation
    from fgpt_hf.ablation.variants import make_variants, parse_axis

    Limits(minimum=1).check("seeds", seeds)
    axes = [parse_axis(text) for text in vary or SWITCHES]
    rates = [rate.strip() for rate in learning_rates.split(",") if rate.strip()]
    results = Ablation(output_dir, make_variants(axes, every_combination), rates, seeds, context.args).run()
    summaries = summarize(results)
    table = markdown_table(summaries)
    (output_dir / "ablation.md").write_text(f"{table}\n", encoding="utf-8")
    draw_losses(summaries, output_dir / "ablation.png")
    print(table)
    print(f"\nfigure: {output_dir / 'ablation.png'}")
