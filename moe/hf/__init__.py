"""Hugging Face: their checkpoints in and out, their MoE models with our expert op. The public names, nothing else."""

from moe.hf.experts import register_experts
from moe.hf.families.mixtral import CONFIG_FILE, HFError, hf_views, load, read_config, save
from moe.hf.families.mixtral_config import config_from_hf, config_to_hf

__all__ = [
    "CONFIG_FILE",
    "HFError",
    "config_from_hf",
    "config_to_hf",
    "hf_views",
    "load",
    "read_config",
    "register_experts",
    "save",
]
