"""FGPT: from raw documents to a published, chatting GPT-2-architecture model, inside the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fgpt_hf.model.configuration_fgpt import FGPTConfig
from fgpt_hf.model.modeling_fgpt import FGPTForCausalLM, FGPTModel

AutoConfig.register(FGPTConfig.model_type, FGPTConfig)
AutoModel.register(FGPTConfig, FGPTModel)
AutoModelForCausalLM.register(FGPTConfig, FGPTForCausalLM)

__all__ = ["FGPTConfig", "FGPTForCausalLM", "FGPTModel"]
