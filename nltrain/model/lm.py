"""The language model: tied embeddings around a stack of blocks, in one call or streamed in pieces.

Each piece returns the state from which the next piece continues; a sequence fed in pieces equals one call. `loss` is
the fp32 sum over real targets, so that the caller decides what to average over.
B sequences, T tokens, D width, V vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import compiler
from nltrain.model import attention
from nltrain.model.config import ATTENTION_FAMILIES, ModelConfig
from nltrain.model.feedforward import CMS, SwiGLU
from nltrain.model.mixers import Attention, MemoryMixer
from nltrain.model.packing import Packing
from nltrain.model.parts import RMSNorm, TiedEmbedding

# Where documents begin: [B, T] bool, True where one does; or that laid out beside the data (`packing.arrange`), which
# spares the step a wait for the device; or None for one document per row.
Documents = Tensor | Packing | None


class LanguageModelState(NamedTuple):
    """A batch of sequences in the middle."""

    position: Tensor  # [B] tokens since each document began
    blocks: tuple[Any, ...]  # the state of every block's mixer


class Block(nn.Module):
    """x + mixer(norm(x)), then the feed-forward part with its own residuals (Eq. 94-97)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = Attention(config) if config.family in ATTENTION_FAMILIES else MemoryMixer(config)
        if config.family == "transformer":
            self.ffn: nn.Module = SwiGLU(config)
        else:
            self.cms = CMS(config)
        if config.compile == "blocks":
            # The chunk loop is unrolled over the sequence and too long to compile whole: each step is compiled alone.
            compiler.require(config.compile_backend, None)
            part = self if config.family in ATTENTION_FAMILIES else self.cms
            part.compile(dynamic=False, backend=config.compile_backend)

    def forward(self, x: Tensor, packing: Packing, state: Any) -> tuple[Tensor, Any]:
        """x [B, T, D] and the mixer's state before it (None: at the start); returns the same after the block."""
        mixed, state = self.mixer(self.norm(x), packing, state)
        x = x + mixed
        return (self.ffn(x) if hasattr(self, "ffn") else self.cms(x)), state


class LanguageModel(nn.Module):
    """Next-token model over `config.vocab_size` tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TiedEmbedding(config.vocab_size, config.width, config.logits_bytes)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        # Residual branches start small, so that the variance does not grow with depth.
        branches = config.num_layers * (2 if config.family == "transformer" else 1 + len(config.levels))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_residual = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=config.width**-0.5 * 0.5 / (branches**0.5 if into_residual else 1))
                if name.endswith(".down") and config.down_init == "zero":
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _begin(
        self, tokens_BT: Tensor, documents: Documents, state: LanguageModelState | None
    ) -> tuple[Packing, Tensor]:
        """Where documents begin, and the embedded tokens [B, T, D]."""
        config, device = self.config, tokens_BT.device
        if config.compile != "none":
            compiler.require(config.compile_backend, device.type)
        packing, x = _packing(tokens_BT, documents, state), self.embedding(tokens_BT)
        if config.family in ATTENTION_FAMILIES:
            compiled = config.compile == "blocks"
            way = attention.chosen(config.attention, config.head_dim, compiled, device, x.dtype)
            packing = replace(packing, attention=way)
        return packing, x

    def _hidden(
        self, tokens_BT: Tensor, documents: Documents, state: LanguageModelState | None
    ) -> tuple[Tensor, LanguageModelState]:
        """The normed output of the last block [B, T, D], and the state after the last token."""
        packing, x = self._begin(tokens_BT, documents, state)
        states = []
        for i, block in enumerate(self.blocks):
            before = state.blocks[i] if state else None
            if self.config.recompute == "block" and torch.is_grad_enabled():
                # Nothing in a block is random.
                x, after = checkpoint(block, x, packing, before, use_reentrant=False, preserve_rng_state=False)
            else:
                x, after = block(x, packing, before)
            states.append(after)
        return self.norm(x), LanguageModelState(packing.next_position, tuple(states))

    def _hidden_alone(self, tokens_BT: Tensor, documents: Documents) -> Tensor:
        """`_hidden` of whole sequences without the state, keeping the inputs of blocks alone for the backward pass.

        Each block's backward pass is one of its own, run after the block was computed again. A sharded engine needs
        that: it releases the weights of a module after its forward pass and gathers them before its backward pass.
        """
        packing, x = self._begin(tokens_BT, documents, None)
        x = x if x.requires_grad else x.detach().requires_grad_()  # else no block would have a gradient

        def output(block: nn.Module, x: Tensor) -> Tensor:
            return block(x, packing, None)[0]

        for block in self.blocks:
            x = checkpoint(output, block, x, use_reentrant=True, preserve_rng_state=False)
        return self.norm(x)

    def forward(
        self, tokens_BT: Tensor, documents: Documents = None, state: LanguageModelState | None = None
    ) -> tuple[Tensor, LanguageModelState]:
        """Logits [B, T, V] and the state after the last token."""
        hidden, state = self._hidden(tokens_BT, documents, state)
        return self.embedding(hidden), state

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, documents: Documents = None) -> Tensor:
        """fp32 scalar: cross entropy in nats, summed over targets != -100."""
        if self.config.recompute == "block" and torch.is_grad_enabled():
            return self.embedding(self._hidden_alone(tokens_BT, documents), targets_BT)
        return self.loss_with_state(tokens_BT, targets_BT, documents)[0]

    def loss_with_state(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        documents: Documents = None,
        state: LanguageModelState | None = None,
    ) -> tuple[Tensor, LanguageModelState]:
        """`loss` of tokens that continue `state`, and the state after the last token."""
        hidden, state = self._hidden(tokens_BT, documents, state)
        return self.embedding(hidden, targets_BT), state

    @torch.no_grad()
    def read(
        self, tokens_BT: Tensor, state: LanguageModelState | None = None, piece: int = 2048
    ) -> tuple[Tensor, LanguageModelState]:
        """Reads a prompt of any length in pieces of `piece` tokens: logits after its last token [B, V], and the state.

        It needs the memory of one piece, and of all keys and values in attention families. Equals one `forward`.

        Raises:
            ValueError: there is no token, or `piece` is not positive.
        """
        if tokens_BT.shape[1] < 1 or piece < 1:
            raise ValueError(f"read: {tokens_BT.shape[1]} tokens in pieces of {piece}: both must be at least 1")
        for part in tokens_BT.split(piece, 1):
            hidden, state = self._hidden(part, None, state)
        assert state is not None
        return self.embedding(hidden[:, -1]), state

    @torch.no_grad()
    def diagnostics(self, tokens_BT: Tensor) -> list[dict[str, Tensor]]:
        """For each block with memories, figures per chunk: eta, alpha, |v|/|k|, |dW|/|W|; see `kernels.diagnostics`."""
        packing, x = self._begin(tokens_BT, None, None)
        figures = []
        for block in self.blocks:
            assert isinstance(block, Block)
            if isinstance(block.mixer, MemoryMixer):
                figures.append(block.mixer.diagnostics(block.norm(x), packing))
            x, _ = block(x, packing, None)
        return figures

    @torch.no_grad()
    def generate(
        self,
        tokens_BT: Tensor,
        num_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """[B, T + num_new_tokens]: tokens_BT and what is sampled after it. The memories keep writing.

        temperature 0: the most likely token. generator: of the device of the tokens; None: torch's global one.
        """
        logits, state = self.read(tokens_BT)
        out = [tokens_BT]
        for i in range(num_new_tokens):
            last = logits.float()
            if temperature > 0:
                token = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
            else:
                token = last.argmax(-1, keepdim=True)
            out.append(token)
            if i + 1 < num_new_tokens:
                logits, state = self.read(token, state)
        return torch.cat(out, 1)


def _packing(tokens_BT: Tensor, documents: Documents, state: LanguageModelState | None) -> Packing:
    """The arrangement of these tokens on their device."""
    if isinstance(documents, Packing):
        assert state is None, "an arrangement made beside the data is that of whole sequences"
        return documents
    num_sequences, num_tokens = tokens_BT.shape
    packing = Packing.of((num_sequences, num_tokens), documents, state.position if state else None)
    return packing.to(tokens_BT.device)


def build(
    config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of `config` as jobs and benchmarks use it, initialised from torch's global generator of the CPU.

    So the same seed gives the same weights on every device. device, dtype: where and as what they then are; None: as
    torch makes them.
    """
    return LanguageModel(config).to(device=device, dtype=dtype)
