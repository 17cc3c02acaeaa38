"""The rule by which a memory writes itself: every choice the paper leaves open, as one frozen config.

The defaults stay finite on every text: v and the length of every write are bounded, and stale gradients are erased
(README.md has the proof). `MemoryRule.paper_letter()` is the printed rule, `MemoryRule.one_sided()` erases on keys
alone; both are known to diverge, see docs/deviations.md.
Names follow "Nested Learning" (arXiv 2512.24695), Eq. 83-93.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

GENERATORS = ("k", "v", "q")
GATES = ("eta", "alpha")
# The triangular solve and the masked reads run on blocks of at most this many tokens; longer chunks are cut exactly.
MAX_BLOCK_TOKENS = 64


class MemoryRuleError(ValueError):
    """A memory option outside its range; the message names the field, its value and the remedy."""


def _one_of(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise MemoryRuleError(f"{type(config).__name__}.{name} = {value!r}: choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class MemoryRule:
    """How the memories of one layer are read and written."""

    memory: str = "mlp"
    """"mlp": M(z) = z + W1 act(W2 z) (Eq. 89). "matrix": M(z) = z + W z, the z only with `residual`."""
    chunk_mem: int = 64
    """Tokens between two snapshots of the main memory. Gradients and targets come from the snapshot."""
    chunk_other: int = 64
    """Tokens between two snapshots of all other memories; one of the two lengths divides the other."""
    adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha")
    """Which of k, v, q, eta, alpha are produced by memories that write themselves; the others stay as projected."""
    residual: bool = True
    """Adds z to the output of a d -> d memory (Eq. 89)."""
    activation: str = "silu"
    """Hidden activation of an mlp memory: "silu" or "gelu". Both are smooth, the outer gradient needs act''."""
    read: str = "live"
    """"live": token t reads the main memory after its own write. "frozen": it reads the snapshot (Eq. 90)."""
    decay: str = "deviation"
    """"deviation": alpha and the rank-one erasure act on W - W_initial. "literal": on the whole W (Eq. 88)."""
    lambda_d: float | tuple[float, ...] = 1.0
    """Weight of the erasure in (alpha I - lambda_d eta k k^T). 1 is the paper, 0 plain gradient descent (Titans). A
    tuple gives one weight per head: heads that track a state need lambda_d * eta above 1, heads that count need 0."""
    eta_max: float | None = None
    """Upper end of the inner learning rate. None: min(0.5, 2 / min(C, 16), 8 / C) for the longer chunk C, a quarter of
    it with momentum. Where nothing is erased, writes of equal keys inside a chunk add up, and this cap alone bounds
    them for runs of up to 16 equal tokens."""
    eta_gate: str = "sigmoid"
    """"sigmoid": eta = eta_max sigmoid(x). "hard": eta = eta_max clamp(1.1 sigmoid(x) - 0.05, 0, 1), which reaches 0
    and eta_max exactly: a state is tracked without drift."""
    objective: str = "l2"
    """Inner objective: "l2" is 1/2 |M(k) - target|^2, "dot" is -<M(k), target>."""
    target: str = "self"
    """"self": each memory makes its own target M(v) (Eq. 84). "value": the target is v itself (gates then stay put)."""
    normalize_inputs: bool = True
    """Brings every vector fed to a memory to unit length."""
    normalize_v: bool = True
    """Brings v = M_v(x) to unit length. Without it M_v inflates its own targets until NaN."""
    normalize_target: bool = False
    """Brings the targets of d -> d memories to unit length."""
    momentum: bool = False
    """Titans' momentum S = beta S - eta G with a data-dependent beta. A gradient acts up to 1 / (1 - beta) times: twice
    at the start, and more often as beta is learned. Without a smaller eta_max training ends in NaN."""
    writes: bool = True
    """False: no memory ever writes and the main memory is read as it was learned (a control for experiments). Then
    `adaptive` keeps at most "q": nothing else is ever read."""
    normalized_step: bool = False
    """Divides the step of W1 by 1 + |act(W2 k)|^2 (normalised least mean squares); allows a larger eta. mlp only."""
    layerwise_dgd: bool | None = None
    """Also erases on the output side W1, along act(W2 k) / |act(W2 k)|, with the same lambda_d. None: wherever there is
    an output side, that is, for memory = "mlp". Without it stale gradients of equal keys add up in W1: any text with
    long repetitions ends in NaN at the caps of eta."""

    gradient_bound: float | None = 2.0
    """Soft bound b on the length of one write's inner gradient g, per matrix: g / sqrt(1 + |g|^2 / b^2), shorter than b
    whatever the weights are. A self-made target grows with the memory that makes it; without this bound trained
    memories can amplify themselves until NaN. None: no bound."""

    def __post_init__(self) -> None:
        _one_of(self, "memory", ("mlp", "matrix"))
        _one_of(self, "activation", ("silu", "gelu"))
        _one_of(self, "read", ("live", "frozen"))
        _one_of(self, "decay", ("deviation", "literal"))
        _one_of(self, "objective", ("l2", "dot"))
        _one_of(self, "target", ("self", "value"))
        _one_of(self, "eta_gate", ("sigmoid", "hard"))
        for name in ("chunk_mem", "chunk_other"):
            if getattr(self, name) < 1:
                raise MemoryRuleError(f"MemoryRule.{name} = {getattr(self, name)}: give at least 1 token")
        if max(self.chunk_mem, self.chunk_other) % min(self.chunk_mem, self.chunk_other):
            raise MemoryRuleError(
                f"MemoryRule.chunk_mem = {self.chunk_mem}, chunk_other = {self.chunk_other}: one must divide the other"
            )
        ordered = tuple(name for name in GENERATORS + GATES if name in self.adaptive)
        if len(ordered) != len(self.adaptive):
            raise MemoryRuleError(f"MemoryRule.adaptive = {self.adaptive}: a subset of {GENERATORS + GATES}, each once")
        object.__setattr__(self, "adaptive", ordered if self.writes else tuple(n for n in ordered if n == "q"))
        if self.layerwise_dgd and self.memory != "mlp":
            raise MemoryRuleError("MemoryRule.layerwise_dgd = True: needs memory = 'mlp', a matrix has one layer")
        if self.normalized_step and self.memory != "mlp":
            raise MemoryRuleError("MemoryRule.normalized_step = True: needs memory = 'mlp', a matrix has one layer")
        if self.eta_max is not None and not self.eta_max > 0:
            raise MemoryRuleError(f"MemoryRule.eta_max = {self.eta_max}: give a number above 0, or None")
        if self.gradient_bound is not None and not self.gradient_bound > 0:
            raise MemoryRuleError(
                f"MemoryRule.gradient_bound = {self.gradient_bound}: give a number above 0, or None for no bound"
            )
        if isinstance(self.lambda_d, (tuple, list)):
            object.__setattr__(self, "lambda_d", tuple(float(weight) for weight in self.lambda_d))
            if not self.lambda_d:
                raise MemoryRuleError("MemoryRule.lambda_d = (): give one number, or one per head")
        for weight in self.erasures:
            if not 0 <= weight * self.eta_limit <= 2 + 1e-9:
                raise MemoryRuleError(
                    f"MemoryRule.lambda_d = {self.lambda_d}: lambda_d * eta_max must lie in [0, 2] "
                    f"(eta_max is {self.eta_limit:g}), beyond it the erasure amplifies"
                )

    @property
    def eta_limit(self) -> float:
        """Upper end of eta."""
        if self.eta_max is not None:
            return self.eta_max
        chunk = max(self.chunk_mem, self.chunk_other)
        return min(0.5, 2 / min(chunk, 16), 8 / chunk) / (4 if self.momentum else 1)

    @property
    def erasures(self) -> tuple[float, ...]:
        """The different weights of the erasure: one for all heads, or one per head."""
        return self.lambda_d if isinstance(self.lambda_d, tuple) else (self.lambda_d,)

    @property
    def erases(self) -> bool:
        """Whether any head erases."""
        return any(self.erasures)

    @property
    def erases_output_side(self) -> bool:
        """Whether W1 is erased too."""
        wanted = self.memory == "mlp" if self.layerwise_dgd is None else self.layerwise_dgd
        return wanted and self.erases

    def check_heads(self, num_heads: int) -> None:
        """Raises MemoryRuleError if a per-head option does not fit `num_heads` heads."""
        if isinstance(self.lambda_d, tuple) and len(self.lambda_d) != num_heads:
            raise MemoryRuleError(
                f"MemoryRule.lambda_d = {self.lambda_d}: has {len(self.lambda_d)} values, the layer has {num_heads} "
                f"heads; give one number, or one per head"
            )

    @property
    def chunk_min(self) -> int:
        """Tokens of the finer of the two snapshot grids."""
        return min(self.chunk_mem, self.chunk_other)

    @property
    def block_tokens(self) -> int:
        """Longest run of tokens handled in one parallel step."""
        return min(self.chunk_min, MAX_BLOCK_TOKENS)

    @property
    def full_names(self) -> tuple[str, ...]:
        """The d -> d memories, in storage order; the main memory "mem" is last."""
        return (*(name for name in GENERATORS if name in self.adaptive), "mem")

    @property
    def gate_names(self) -> tuple[str, ...]:
        """The d -> 1 memories, in storage order."""
        return tuple(name for name in GATES if name in self.adaptive)

    def rows(self, name: str, head_dim: int, hidden: int) -> slice:
        """Where memory `name` lies among the stacked rows of the input-side matrices (`Weights.w2`)."""
        full = hidden if self.memory == "mlp" else head_dim
        if name in self.full_names:
            first = self.full_names.index(name) * full
            return slice(first, first + full)
        gate = hidden if self.memory == "mlp" else 1
        first = len(self.full_names) * full + self.gate_names.index(name) * gate
        return slice(first, first + gate)

    def num_rows(self, head_dim: int, hidden: int) -> int:
        """Rows of the stacked input-side matrices."""
        last = self.gate_names[-1] if self.gate_names else "mem"
        return self.rows(last, head_dim, hidden).stop

    @classmethod
    def paper_letter(cls, **changes: Any) -> "MemoryRule":
        """Eq. 83-93 as printed: unbounded v, decay of the whole weight, frozen read, chunk 16, eta up to 1."""
        letter = cls(
            chunk_mem=16, chunk_other=16, read="frozen", decay="literal", eta_max=1.0, normalize_v=False,
            normalize_inputs=False, layerwise_dgd=False, gradient_bound=None,
        )  # fmt: skip
        return replace(letter, **changes)

    @classmethod
    def one_sided(cls, **changes: Any) -> "MemoryRule":
        """The erasure acts on the input side alone, the default of release 0.1.0; repetitive text breaks it."""
        return cls(**{"layerwise_dgd": False, "gradient_bound": None, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MemoryRule":
        """The inverse of `dataclasses.asdict`, refusing unknown names."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise MemoryRuleError(f"MemoryRule has no field {sorted(unknown)}")
        values = dict(values)
        for name in ("adaptive", "lambda_d"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)


def largest_change(rule: MemoryRule, num_tokens: int) -> float:
    """Upper bound of |W - W_initial| (Frobenius, any matrix of any memory) after `num_tokens` writes.

    It holds for any weights, inputs and alpha; README.md beside this file derives it. Infinite where nothing bounds a
    write.
    """
    bound, eta = rule.gradient_bound, rule.eta_limit
    if bound is None or rule.momentum or rule.decay != "deviation":
        return math.inf
    if max(rule.erasures) * eta > 0.5:
        return math.inf
    linear = num_tokens * eta * bound
    if min(rule.erasures) == 0 or (rule.memory == "mlp" and not rule.erases_output_side):
        return linear  # some matrix is not erased
    return min(linear, max(math.sqrt(linear * bound / (w * (2 - w * eta))) for w in rule.erasures))
