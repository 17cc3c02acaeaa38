"""Which code computes a model here, said in one line; a choice that cannot run is refused before anything is built."""

import torch

from kernels import compiler, dispatch
from nltrain.errors import require
from nltrain.model import attention
from nltrain.model.config import ATTENTION_FAMILIES, ModelConfig
from nltrain.model.loss import rows_per_piece

RECOMPUTED = {
    "none": "the backward pass computes nothing again",
    "chunks": "the backward pass computes the chunk loop again",
    "block": "the backward pass computes each block again",
}


def say_choices(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What computes the model of `config` on this device, its weights in `dtype`.

    Raises:
        ConfigError: a choice of the config cannot run here; it names the field, its value and the reason.
    """
    said = [_mixer(config, device, dtype)]
    if config.compile != "none":
        reason = compiler.refusal(config.compile_backend, device.type)
        require(reason is None, "model.compile_backend", config.compile_backend, reason or "")
        said.append(f"{config.compile} compiled by {config.compile_backend}")
    said.append(RECOMPUTED[config.recompute])
    said.append(f"the loss takes at most {rows_per_piece(config.vocab_size, config.logits_bytes):,} tokens at once")
    return ", ".join(said)


def _mixer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    if config.family in ATTENTION_FAMILIES:
        where = (config.head_dim, config.compile == "blocks", device, dtype)
        reason = attention.refusal(config.attention, *where)
        require(reason is None, "model.attention", config.attention, reason or "")
        return f"attention inside documents by {attention.chosen(config.attention, *where)} ({config.attention})"
    reason = dispatch.refusal(config.kernel, config.rule, config.kernel_options, device.type)
    require(reason is None, "model.kernel", config.kernel, reason or "")
    kernel = dispatch.chosen(config.kernel, config.rule, config.kernel_options, device.type)
    return f"memories by {kernel} ({config.kernel})"
