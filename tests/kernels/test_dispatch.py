"""One place chooses the implementation; what cannot run is refused with the reason."""

import pytest
import torch

from benchmarks._memory_cases import DEVICE, leaves, make_case, relative, with_leaves
from kernels import MemoryRule, chunk, compiler, dispatch
from kernels.blocking import build_blocking
from kernels.dispatch import AUTOMATIC, IMPLEMENTATIONS, KERNELS, KernelError, Options, choose, chosen, refusal

RULE = MemoryRule(chunk_mem=8, chunk_other=8)
DEVICE_TYPE = torch.device(DEVICE).type
RUNNABLE = [name for name in IMPLEMENTATIONS if refusal(name, RULE, Options(), DEVICE_TYPE) is None]


def test_auto_takes_the_first_that_can_run() -> None:
    assert chosen("auto", RULE, Options(), DEVICE_TYPE) == RUNNABLE[0] == "chunk"  # Triton has no chunk of 8
    assert set(AUTOMATIC) <= set(IMPLEMENTATIONS) and KERNELS[0] == "auto"


@pytest.mark.parametrize("rule", [RULE, MemoryRule(chunk_mem=8, chunk_other=8, momentum=True),
                                  MemoryRule(chunk_mem=8, chunk_other=8, momentum=True, writes=False)])  # fmt: skip
@pytest.mark.parametrize("documents", [0.0, 0.1])
def test_every_implementation_takes_the_same_arguments_and_agrees(rule: MemoryRule, documents: float) -> None:
    case = make_case(rule, 21, 2, documents=documents)
    first = torch.zeros(2, dtype=torch.long, device=DEVICE)
    blocking = build_blocking(rule, 21, first, case.document_starts)
    found = {}
    for name in RUNNABLE:
        call = choose(name, rule, Options(), DEVICE_TYPE)
        found[name] = call(case.inputs, case.initial, rule, None, case.document_starts, blocking)
    want, want_state = chunk.self_modify(case.inputs, case.initial, rule, None, case.document_starts)
    for name, (output, state) in found.items():
        assert relative(output, want) <= 1e-12, name
        for part, tensor in want_state.to_tensors().items():
            assert relative(state.to_tensors()[part], tensor) <= 1e-12, (name, part)


def test_every_implementation_keeps_the_dtype_of_the_inputs_and_an_fp32_state() -> None:
    case = make_case(RULE, 10, 1)
    low = {n: t.bfloat16() if n.startswith("inputs.") else t.float() for n, t in leaves(case).items()}
    case = with_leaves(case, low)
    for name in RUNNABLE:
        output, state = choose(name, RULE, Options(), DEVICE_TYPE)(case.inputs, case.initial, RULE, None, None, None)
        assert output.dtype == torch.bfloat16 and state.run.w2.dtype == torch.float32, name


def test_what_cannot_run_is_refused_with_the_reason() -> None:
    with pytest.raises(KernelError, match=r"kernel = 'fast': choose one of auto, triton, chunk, naive"):
        choose("fast", RULE, Options(), DEVICE_TYPE)
    for options, word in ((Options(recompute=True), "recompute"), (Options(compile_backend="eager"), "compile_backend"),
                          (Options(truncate_blocks=2), "truncate_blocks")):  # fmt: skip
        with pytest.raises(KernelError, match=rf"kernel = 'naive': the token loop has no {word}; choose"):
            choose("naive", RULE, options, DEVICE_TYPE)
        assert refusal("auto", RULE, options) is None
    with pytest.raises(KernelError, match=r"kernel = 'auto': chunk: torch has no back end 'nonesuch'"):
        choose("auto", RULE, Options(compile_backend="nonesuch"), DEVICE_TYPE)
    # Before a device is known, the back end is not looked at.
    assert refusal("chunk", RULE, Options(compile_backend="nonesuch")) is None


def test_a_new_implementation_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rule: MemoryRule, options: Options, device_type: str | None) -> str | None:
        return "needs chunks of 64; choose kernel = 'chunk'" if rule.chunk_min != 64 else None

    added = dispatch.Implementation(IMPLEMENTATIONS["chunk"].run, refuse)
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "other", added)
    monkeypatch.setattr(dispatch, "AUTOMATIC", ("other", *AUTOMATIC))
    monkeypatch.setattr(dispatch, "KERNELS", ("auto", *dispatch.IMPLEMENTATIONS))
    chosen.cache_clear()
    try:
        assert chosen("auto", MemoryRule(), Options(), DEVICE_TYPE) == "other"
        assert chosen("auto", RULE, Options(), DEVICE_TYPE) == RUNNABLE[0]
        with pytest.raises(KernelError, match="kernel = 'other': needs chunks of 64"):
            chosen("other", RULE, Options(), DEVICE_TYPE)
    finally:
        chosen.cache_clear()


def test_inductor_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    compiler.refusal.cache_clear()
    try:
        with pytest.raises(compiler.CompilerError, match=r"'inductor': inductor needs a C\+\+ compiler"):
            compiler.require("inductor", "cpu")
        compiler.require("aot_eager", "cpu")
    finally:
        compiler.refusal.cache_clear()
