"""Which code computes a model here, said in one line; a choice that cannot run is refused before anything is built."""

import torch

from kernels import compiler, dispatch
from nltrain.errors import ConfigError
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
    try:
        said = [_mixer(config, device, dtype)]
    except (dispatch.KernelError, attention.AttentionError) as error:
        raise ConfigError(f"model.{error}") from None
    if config.compile != "none":
        reason = compiler.refusal(config.compile_backend, device.type)
        if reason is not None:
            raise ConfigError(f"model.compile_backend = {config.compile_backend!r}: {reason}")
        said.append(f"{config.compile} compiled by {config.compile_backend}")
    said.append(RECOMPUTED[config.recompute])
    said.append(f"the loss takes at most {rows_per_piece(config.vocab_size, config.logits_bytes):,} tokens at once")
    return ", ".join(said)


def _mixer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    if config.family in ATTENTION_FAMILIES:
        compiled = config.compile == "blocks"
        way = attention.chosen(config.attention, config.head_dim, compiled, device, dtype)
        return f"attention inside documents by {way} ({config.attention})"
    kernel = dispatch.chosen(config.kernel, config.rule, config.kernel_options, device.type)
    return f"memories by {kernel} ({config.kernel})"
