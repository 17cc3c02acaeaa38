"""Host memory for the tensors that a slow level does not need between ticks.

`sleep` copies tensors to (pinned) host memory and frees their device storage; `prefetch` starts the copies back on a
side stream and `wake` waits for them. Values are copied, never recomputed, so that training is bit for bit the same
with offload and without.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HostMemory:
    """Host copies of the tensors that `list_tensors` returns: the same objects in the same order on every call."""

    def __init__(self, list_tensors: Callable[[], Sequence[Tensor]], device: torch.device):
        self._list_tensors, self._device = list_tensors, device
        self._host: dict[int, Tensor] = {}  # by id of the device tensor; pinned on CUDA, reused for the whole run
        self._arriving: list[Tensor] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.asleep = False

    def resident(self, tensor: Tensor) -> Tensor:
        """Where the values of `tensor` are now: its host copy while it sleeps, else itself. May wait for a copy."""
        if self._arriving:
            self.wake()
        if not self.asleep or id(tensor) not in self._host:
            return tensor.detach()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()
        return self._host[id(tensor)]

    def sleep(self) -> None:
        """Device to host; device storage is freed."""
        if self.asleep:
            return
        for tensor in self._list_tensors():
            host = self._host.get(id(tensor))
            if host is None:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
                self._host[id(tensor)] = host
            # Stream order keeps the device storage until the copy has read it.
            host.copy_(tensor.detach(), non_blocking=True)
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)
        self.asleep = True

    def prefetch(self) -> None:
        """Starts host to device on a side stream; does nothing where host and device are the same memory."""
        if self.asleep and not self._arriving and self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._arriving = [self._fetch(tensor) for tensor in self._list_tensors()]

    def _fetch(self, tensor: Tensor) -> Tensor:
        host = self._host[id(tensor)]
        return host.to(self._device, non_blocking=True) if self._stream is not None else host.clone()

    def wake(self) -> None:
        """Host to device, finished when work queued after this runs."""
        if not self.asleep:
            return
        tensors = self._list_tensors()
        arrived = self._arriving or [self._fetch(tensor) for tensor in tensors]
        if self._arriving and self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for value in arrived:
                value.record_stream(current)
        for tensor, value in zip(tensors, arrived, strict=True):
            tensor.data = value
        self._arriving = []
        self.asleep = False
