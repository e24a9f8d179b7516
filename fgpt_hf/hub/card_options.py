"""What a person adds to a model card."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What only a person can say of a model; what is not given is left out of the card.

    Attributes:
        repo_id: where the model is published.
        architecture: how it is published: as fgpt with its code, as a stock class of transformers by its name, such as
            qwen3, or as the one that computes the same (auto).
        gguf: types of weights, such as Q8_0, of the GGUF files to publish with it.
        license: the license of the weights, such as mit.
        language: the language of the data, such as en.
        base_model: the model on the Hub from which this one was trained.
        space: the Space that serves the model.
        dollars_per_hour: the price of one device.
        watts: the power of one device.

    Example:
        >>> CardOptions(license="mit", language="en").license
        'mit'
    """

    repo_id: str | None = None
    architecture: str = "fgpt"
    gguf: tuple[str, ...] = ()
    license: str | None = None
    language: str | None = None
    base_model: str | None = None
    space: str | None = None
    dollars_per_hour: float | None = None
    watts: float | None = None
