"""chunk == naive in float64: outputs, final states and gradients, for every option, in the stable range.

Stable range: eta_max * lambda_d <= 2, eta_max <= min(0.5, 8 / C), unit-norm memory inputs. Where an option is known to
run away (unbounded v), sequences are short and eta small enough for finite states; `errors` asserts finiteness.
"""

import pytest

from kernels import MemoryRule
from tests.kernels.helpers import errors, make_case

FORWARD, BACKWARD = 1e-12, 1e-10

OPTIONS: dict[str, dict] = {
    "defaults": {},
    "frozen_read": {"read": "frozen"},
    "literal_decay": {"decay": "literal"},
    "no_erasure": {"lambda_d": 0.0},
    "negative_eigenvalues": {"eta_max": 0.1, "lambda_d": 20.0},
    "momentum": {"momentum": True},
    "matrix": {"memory": "matrix"},
    "layerwise_dgd": {"layerwise_dgd": True},
    "dot": {"objective": "dot"},
    "normalized_target": {"normalize_target": True},
    "unbounded_v": {"normalize_v": False, "eta_max": 0.02},
    "raw_inputs": {"normalize_inputs": False, "eta_max": 0.02},
    "adaptive_q": {"adaptive": ("k", "v", "q", "eta", "alpha")},
    "static_projections": {"adaptive": ("eta", "alpha")},
    "static_all": {"adaptive": ()},
    "value_target": {"target": "value"},
    "gelu": {"activation": "gelu"},
}


def _rule(option: dict, chunk: int, **changes: object) -> MemoryRule:
    return MemoryRule(**{"chunk_mem": chunk, "chunk_other": chunk, **option, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_each_option_equals_the_token_loop(option: str, chunk: int) -> None:
    rule = _rule(OPTIONS[option], chunk)
    for num_tokens, num_sequences, documents in ((1, 1, 0.0), (63, 2, 0.0), (64, 3, 0.08)):
        case = make_case(rule, num_tokens, num_sequences, documents=documents)
        forward, backward = errors(case)
        assert forward <= FORWARD, (num_tokens, forward)
        assert backward <= BACKWARD, (num_tokens, backward)
