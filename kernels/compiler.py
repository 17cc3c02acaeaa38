"""Whether torch.compile can run here. A back end that cannot run is refused with the reason; nothing replaces it."""

from functools import cache
from importlib.util import find_spec

import torch


class CompilerError(RuntimeError):
    """torch.compile was asked for where it cannot run; the message says why and what to do."""


@cache
def refusal(backend: str, device_type: str | None) -> str | None:
    """Why the back end cannot compile for the device type ("cpu", "cuda"); None if it can.

    device_type None: before a device is known. Then only the name of the back end is checked.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        return f"torch has no back end {backend!r}; choose one of {', '.join(known)}"
    if backend != "inductor":
        return None
    if device_type == "cuda":
        return None if find_spec("triton") else "inductor needs the package triton on a GPU; install it"
    if device_type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            return f"inductor needs a C++ compiler on a CPU ({reason}); install g++, or choose compile = 'none'"
    return None


def require(backend: str, device_type: str | None) -> None:
    """Raises CompilerError where the back end cannot compile for the device type."""
    reason = refusal(backend, device_type)
    if reason is not None:
        raise CompilerError(f"compile_backend = {backend!r}: {reason}")
