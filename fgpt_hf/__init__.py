"""FGPT: from raw documents to a published, chatting GPT-2-architecture model, inside the Hugging Face ecosystem.

`import fgpt_hf` is quick. The first use of one of its names imports torch and transformers, and registers FGPT with
`AutoConfig`, `AutoModel` and `AutoModelForCausalLM`; `import fgpt_hf.model` does the same.

Example:
    >>> from transformers import AutoModelForCausalLM
    >>> from fgpt_hf import FGPTConfig
    >>> config = FGPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> type(AutoModelForCausalLM.from_config(config)).__name__
    'FGPTForCausalLM'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgpt_hf.model import FGPTConfig, FGPTForCausalLM, FGPTModel

__all__ = ["FGPTConfig", "FGPTForCausalLM", "FGPTModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Return a public name of the package, importing what it needs (PEP 562)."""
    if name == "__version__":
        return import_module("importlib.metadata").version("fgpt-hf")
    if name in __all__:
        return getattr(import_module("fgpt_hf.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
