"""The maths of self-modifying memories: `naive` (token by token, the truth), `chunk` (chunk-parallel, any device) and
`triton_call` (kernels for the default rule, on a GPU).

All share one signature, `self_modify(inputs, initial, rule, state=None, document_starts=None)`, and import torch only;
triton is imported by the first call that runs a kernel.
README.md beside this file derives the chunk form and its costs.
"""

from kernels.rule import MemoryRule, MemoryRuleError
from kernels.state import Initial, Inputs, MemoryState, Weights

__all__ = ["Initial", "Inputs", "MemoryRule", "MemoryRuleError", "MemoryState", "Weights"]
