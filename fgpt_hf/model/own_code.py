"""The code that goes with a model: its hash, whether it is the installed one, and the class that it defines if not.

transformers runs the classes that `fgpt_hf` registers, and never a model's own, even with `trust_remote_code`.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import cached_file

from fgpt_hf.model.configuration_fgpt import FGPTConfig

logger = logging.getLogger(__name__)

CODE = ("configuration_fgpt.py", "blocks_fgpt.py", "modeling_fgpt.py")
AUTO_CLASS = "AutoModelForCausalLM"


def network_code_hash() -> str:
    """Return the sha256 of the installed code of the network, which is published with the weights.

    Example:
        >>> len(network_code_hash())
        64
    """
    digest = hashlib.sha256()
    for file in CODE:
        digest.update(Path(__file__).with_name(file).read_bytes())
    return digest.hexdigest()


def causal_model_class(name: str, config: PreTrainedConfig, trust_remote_code: bool) -> Any:
    """Return what loads a model: transformers' Auto class, or for FGPT the class of its own code where that is trusted.

    Code that is not the installed one is run or left out, and that is logged.

    Args:
        name: a model's folder, or its id on the Hub.
        config: the model's configuration.
        trust_remote_code: run the model's own code.
    """
    reference = (getattr(config, "auto_map", None) or {}).get(AUTO_CLASS)
    if not isinstance(config, FGPTConfig) or reference is None or not differs_from_installed(name, config.auto_map):
        return AutoModelForCausalLM
    if not trust_remote_code:
        logger.warning(
            "%s comes with code that differs from the installed code, which is used: --trust_remote_code runs its own",
            name,
        )
        return AutoModelForCausalLM
    logger.warning("%s runs with its own code, which differs from the installed code", name)
    return get_class_from_dynamic_module(reference, name)


def differs_from_installed(name: str, auto_map: Mapping[str, str]) -> bool:
    """Return whether a file of the code that comes with a model is not the installed one.

    A file that cannot be had, such as without a network, does not differ.
    """
    for reference in auto_map.values():
        repo, _, path = reference.rpartition("--")
        if _differs(repo or name, f"{path.partition('.')[0]}.py"):
            return True
    return any(_differs(name, file) for file in CODE)


def _differs(name: str, file: str) -> bool:
    found = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if found is None:
        return False
    installed = Path(__file__).with_name(file)
    return file not in CODE or Path(found).read_bytes() != installed.read_bytes()
