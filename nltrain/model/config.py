"""What a model is: one frozen config for Hope, its ablations and its rivals.

All families share the block wiring, so that comparisons differ in one thing: `hope` and `titans` and `matrix` differ in
the memory rule, `hope_attention` and `transformer` replace the memories by softmax attention.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from kernels import MemoryRule
from kernels.dispatch import Options, refusal
from nltrain.errors import ConfigError, require
from nltrain.model import attention
from nltrain.settings import MAY_CHANGE

FAMILIES = ("hope", "hope_attention", "titans", "matrix", "transformer")
ATTENTION_FAMILIES = ("hope_attention", "transformer")
# Fields that decide which code computes the numbers. They change results within rounding only: they may change on
# resume, and what is kept of a run (an exported model, the result of a benchmark) does not depend on them.
IMPLEMENTATION_FIELDS = ("kernel", "attention", "compile", "compile_backend", "logits_bytes")
# Child names of the CMS module that are not levels.
RESERVED_LEVEL_NAMES = ("mix", "base", "rest")

# What release 0.1.0, which had no such fields, did.
BEFORE_FIELDS = {"level_mlp": "silu", "down_init": "small"}
BEFORE_RULE_FIELDS = {"gradient_bound": None}


@dataclass(frozen=True)
class ModelConfig:
    """A language model of one of the families."""

    family: str = "hope"
    """hope, hope_attention (attention + CMS), titans (static projections, one memory), matrix (gated delta rule),
    transformer (rotary, SwiGLU)."""
    vocab_size: int = 32_000
    """Tokens in the vocabulary; embeddings are tied."""
    width: int = 768
    """Model width D."""
    num_layers: int = 16
    """Blocks."""
    head_dim: int = 128
    """Width d of a head; the number of heads is width / head_dim."""
    memory_hidden: int = 128
    """Hidden width h of a two-layer memory, per head."""
    rule: MemoryRule = field(default_factory=MemoryRule)
    """How the memories write themselves (families with memories)."""
    levels: tuple[str, ...] = ("fast", "mid", "slow")
    """Names of the CMS levels, fast to slow. A single one is an ordinary feed-forward layer and belongs to base."""
    cms_variant: str = "chain"
    """"chain": level after level (Eq. 70). "independent": a learned weighted sum of parallel levels (Eq. 74)."""
    level_mlp: str = "swiglu"
    """"swiglu": a level is down(SiLU(gate x) * up x). "silu": down(SiLU(up x)), the two-layer perceptron."""
    cms_hidden: int | None = None
    """Hidden width of all CMS levels of a block together. None: the parameters of one feed-forward layer, 8 width^2:
    4 x width for "silu", 8/3 x width for "swiglu", in multiples of 128 (64 below a width of 512)."""
    ffn_hidden: int | None = None
    """Hidden width of the SwiGLU of `transformer`. None: as many parameters per block as Hope has."""
    down_init: str = "zero"
    """Output side of every feed-forward part (CMS level or SwiGLU) at the start. "zero": a block begins as its mixer
    alone; the gate and up sides get their first gradient in the second step. "small": N(0, 1 / (4 width branches))."""
    conv_width: int = 4
    """Taps of the causal depthwise convolution on the q, k, v paths; 0 for none."""
    rope_theta: float = 10_000.0
    """Base of the rotary angles (attention families)."""
    norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    w1_std: float = 0.02
    """Standard deviation of the initial output side of the memories."""
    w2_scale: float = 1.0
    """Initial input side of two-layer memories: N(0, w2_scale^2 / d). Larger keeps keys further apart, at less stable
    writes."""
    eta_init: float | None = None
    """Initial inner learning rate. None: min(0.1, eta_max / 2)."""
    alpha_init: float = 0.99
    """Initial retention per token."""
    recompute: str = field(default="none", metadata=MAY_CHANGE)
    """What the backward pass computes again instead of keeping it. "none": nothing. "chunks": the chunk loop, from the
    memories' states at every sqrt(chunks)-th boundary. "block": each block, from its input; keeps least."""
    truncate_chunks: int | None = None
    """Cuts the outer gradient through the memories' states every so many (shorter) chunks. None: never."""
    kernel: str = field(default="auto", metadata=MAY_CHANGE)
    """Implementation of the memories (kernels/dispatch.py). "triton": kernels for the default rule, on a GPU. "chunk":
    chunk-parallel. "naive": token by token, the definition, a hundred times slower. "auto": the fastest that is
    proven, "chunk" so far; the only value for attention families."""
    compile: str = field(default="none", metadata=MAY_CHANGE)
    """Parts that run through torch.compile. "none"; "steps": each step of the chunk loop (families with memories);
    "blocks": also the feed-forward parts, and whole blocks of attention families."""
    compile_backend: str = field(default="inductor", metadata=MAY_CHANGE)
    """Back end of torch.compile, unused when compile is "none". "inductor" needs a C++ compiler on a CPU and triton on
    a GPU; "aot_eager" needs neither and is no faster than no compilation."""

    attention: str = field(default="auto", metadata=MAY_CHANGE)
    """How attention inside documents is computed (nltrain/model/attention.py). "varlen": one launch for all documents,
    on a GPU in bf16. "documents": one call per document. "mask": a dense mask. "auto": the first of these that can run;
    the only value for families with memories."""
    logits_bytes: int = field(default=256 << 20, metadata=MAY_CHANGE)
    """fp32 logits held at once, in bytes: the loss of a batch with more is computed in pieces of its tokens."""

    def __post_init__(self) -> None:
        def need(holds: bool, name: str, remedy: str) -> None:
            require(holds, f"model.{name}", getattr(self, name), remedy)

        object.__setattr__(self, "levels", tuple(self.levels))
        need(self.family in FAMILIES, "family", f"choose one of {', '.join(FAMILIES)}")
        for name in ("vocab_size", "width", "num_layers", "head_dim", "memory_hidden"):
            need(getattr(self, name) >= 1, name, "must be at least 1")
        need(self.width % self.head_dim == 0, "head_dim", f"must divide model.width={self.width}")
        has_memories = self.family not in ATTENTION_FAMILIES
        need(has_memories or self.head_dim % 2 == 0, "head_dim", "rotary positions need an even number")
        names = [name for name in self.levels if name.isidentifier() and name not in RESERVED_LEVEL_NAMES]
        need(
            bool(names) and len(set(names)) == len(self.levels),
            "levels",
            f"give distinct identifiers, fast to slow, none of {', '.join(RESERVED_LEVEL_NAMES)}",
        )
        need(self.cms_variant in ("chain", "independent"), "cms_variant", "choose chain or independent")
        need(self.level_mlp in ("swiglu", "silu"), "level_mlp", "choose swiglu or silu")
        need(self.down_init in ("zero", "small"), "down_init", "choose zero or small")
        if has_memories:
            self.rule.check_heads(self.num_heads)
        need(self.cms_total >= len(self.levels), "cms_hidden", "must be at least one per level")
        need(self.conv_width >= 0, "conv_width", "must be at least 0: the taps, or 0 for none")
        need(self.recompute in ("none", "chunks", "block"), "recompute", "choose none, chunks or block")
        need(self.logits_bytes >= 1, "logits_bytes", "must be at least 1")
        need(self.truncate_chunks is None or self.truncate_chunks >= 1, "truncate_chunks", "give at least 1, or none")
        self._check_implementation()

    def _check_implementation(self) -> None:
        """What can be checked before a device is known; the first forward pass checks the rest."""
        require(
            self.compile in ("none", "steps", "blocks"), "model.compile", self.compile, "choose none, steps or blocks"
        )
        not_again = "torch.compile's code does not run inside a block's own backward pass; choose chunks or none"
        require(self.compile == "none" or self.recompute != "block", "model.recompute", self.recompute, not_again)
        if self.family in ATTENTION_FAMILIES:
            require(self.kernel == "auto", "model.kernel", self.kernel, f"{self.family} has no memories; use auto")
            no_loop = f"{self.family} has no chunk loop; choose none or blocks"
            require(self.compile != "steps", "model.compile", self.compile, no_loop)
            no_loop = f"{self.family} has no chunk loop; choose none or block"
            require(self.recompute != "chunks", "model.recompute", self.recompute, no_loop)
            reason = attention.refusal(self.attention, self.head_dim, self.compile == "blocks", None, torch.bfloat16)
            require(reason is None, "model.attention", self.attention, reason or "")
            return
        no_attention = f"{self.family} has no attention; use auto"
        require(self.attention == "auto", "model.attention", self.attention, no_attention)
        reason = refusal(self.kernel, self.rule, self.kernel_options)
        require(reason is None, "model.kernel", self.kernel, reason or "")

    @property
    def kernel_options(self) -> Options:
        """How the memories are computed, for `kernels.dispatch`."""
        blocks_per_chunk = -(-self.rule.chunk_min // self.rule.block_tokens)
        return Options(
            recompute=self.recompute == "chunks",
            compile_backend=None if self.compile == "none" else self.compile_backend,
            truncate_blocks=self.truncate_chunks and self.truncate_chunks * blocks_per_chunk,
        )

    @property
    def num_heads(self) -> int:
        """Heads per block."""
        return self.width // self.head_dim

    @property
    def cms_total(self) -> int:
        """Hidden width of all CMS levels of a block together."""
        if self.cms_hidden is not None:
            return self.cms_hidden
        return self._round(4 * self.width if self.level_mlp == "silu" else 8 * self.width / 3)

    def level_hidden(self) -> dict[str, int]:
        """Hidden width of each level, fast to slow; they add up to `cms_total`, in multiples as coarse as it is."""
        k, total = len(self.levels), self.cms_total
        # The largest power of two up to 128 that divides the total and leaves at least one multiple per level.
        unit = next(u for u in (128, 64, 32, 16, 8, 4, 2, 1) if total % u == 0 and total // u >= k)
        ends = [round(total / unit * (i + 1) / k) * unit for i in range(k)]
        return {name: end - begin for name, begin, end in zip(self.levels, [0, *ends], ends, strict=False)}

    @property
    def swiglu_hidden(self) -> int:
        """Hidden width of the SwiGLU: by default the one that makes a block as large as Hope's with h = d_head."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        # Hope's block has 5 D^2 + 8 D h of matrices and three per level, attention uses 4 D^2, SwiGLU has three.
        per_hidden = (3 if self.level_mlp == "swiglu" else 2) * self.cms_total / 3
        return self._round((self.width + 8 * self.memory_hidden) / 3 + per_hidden)

    def _round(self, hidden: float) -> int:
        """To a multiple that keeps bf16 products on the fast path; a model narrower than that keeps 8."""
        unit = 128 if self.width >= 512 else 64 if self.width >= 128 else 8
        return max(1, round(hidden / unit)) * unit

    def level_patterns(self) -> dict[str, tuple[str, ...]]:
        """Patterns over `named_parameters()` per CMS level, fast to slow; everything unmatched is base."""
        if self.family == "transformer" or len(self.levels) == 1:
            return {}
        return {name: (f"*.cms.{name}.*",) for name in self.levels}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> "ModelConfig":
        """`from_dict` of what a run saved, possibly by an earlier release and on another machine.

        A field that its release did not have takes the value it had in effect. IMPLEMENTATION_FIELDS take their
        defaults, because the code that trained the model may not run here.
        """
        values = BEFORE_FIELDS | {name: value for name, value in values.items() if name not in IMPLEMENTATION_FIELDS}
        if isinstance(values.get("rule"), dict):
            values["rule"] = BEFORE_RULE_FIELDS | values["rule"]
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`, refusing unknown names."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(f"model: no such fields: {', '.join(sorted(unknown))}; leave them out")
        values = dict(values)
        if isinstance(values.get("rule"), dict):
            values["rule"] = MemoryRule.from_dict(values["rule"])
        if "levels" in values:
            values["levels"] = tuple(values["levels"])
        return cls(**values)
