"""FGPT's network and its configuration.

Importing this package, or anything in it, registers FGPT with transformers' Auto classes. It takes the seconds that
torch takes, which `import fgpt_hf` alone does not.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM, FGPTModel

AutoConfig.register(FGPTConfig.model_type, FGPTConfig)
AutoModel.register(FGPTConfig, FGPTModel)
AutoModelForCausalLM.register(FGPTConfig, FGPTForCausalLM)

__all__ = ["FGPTConfig", "FGPTForCausalLM", "FGPTModel"]
