"""Checkpoints of others: Hugging Face's Llama, Mistral and Mixtral, Qwen 2, 3 and 3-MoE, GPT-2."""

from spmd_train.interop.hf_config import hf_config, model_config_from_hf
from spmd_train.interop.huggingface import hf_shapes, open_params, save_params, to_hf

__all__ = ["hf_config", "hf_shapes", "model_config_from_hf", "open_params", "save_params", "to_hf"]
