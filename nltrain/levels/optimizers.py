"""The optimizers of levels: everything that the rest of nltrain knows about an optimizer stands in this file.

To add an optimizer, write a subclass of `LevelOptimizer` and list it in OPTIMIZERS: configuration, engine, checkpoints
and the plan of a run ask it. A setting that no other optimizer has is a field of LevelConfig and a property of
`OptimizerSettings`. Weight decay, clipping and the cap on a tick's change belong to the engine. torch is imported only
where an optimizer is created, because configurations are read without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

STATE_ELEMENT_BYTES = 4  # optimizer state is fp32 for every dtype of the model


class OptimizerSettings(Protocol):
    """The fields of LevelConfig that optimizers read."""

    @property
    def optimizer(self) -> str:
        """Name of the optimizer."""
        ...

    @property
    def lr(self) -> float:
        """Learning rate of a tick before the schedule's factor."""
        ...

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of two moments per tick."""
        ...

    @property
    def eps(self) -> float:
        """Added to a denominator."""
        ...

    @property
    def momentum(self) -> float:
        """Decay of a momentum per tick."""
        ...

    @property
    def offload(self) -> bool:
        """Whether masters and optimizer state are in host memory between ticks."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether the level is never updated."""
        ...


class LevelOptimizer(ABC):
    """What nltrain must know about one optimizer. An instance holds no state: it serves all levels of a run."""

    name: ClassVar[str]
    """the value of LevelConfig.optimizer"""
    reads: ClassVar[tuple[str, ...]] = ()
    """fields of LevelConfig that it reads beside lr"""
    needs_whole_matrices: ClassVar[bool] = False
    """whether the update of a matrix needs all elements of the matrix; else each element may be on another rank"""

    @abstractmethod
    def state_names(self, settings: OptimizerSettings) -> tuple[str, ...]:
        """Keys of its state tensors, each with one fp32 element per parameter; a checkpoint names them NAME.key."""

    @abstractmethod
    def create(
        self, groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device
    ) -> torch.optim.Optimizer:
        """The torch optimizer over `groups` ({"params": [...]}), without weight decay: the engine decays."""

    def state_bytes(self, settings: OptimizerSettings) -> int:
        """Bytes of state per parameter, over all ranks."""
        return STATE_ELEMENT_BYTES * len(self.state_names(settings))

    def create_state(
        self, optimizer: torch.optim.Optimizer, masters: Sequence[torch.Tensor], settings: OptimizerSettings
    ) -> None:
        """Creates the state that the first step would create, because saves need it before. `masters` are flat fp32."""
        import torch

        for master in masters:
            for key in self.state_names(settings):
                optimizer.state[master][key] = torch.zeros_like(master.detach())

    def steps(self, optimizer: torch.optim.Optimizer, masters: Sequence[torch.Tensor]) -> int:
        """Steps that the optimizer has counted; 0 where it does not count. A host sync on GPUs."""
        return 0

    def set_steps(  # noqa: B027 - an optimizer that does not count its steps has nothing to restore
        self, optimizer: torch.optim.Optimizer, masters: Sequence[torch.Tensor], steps: int
    ) -> None:
        """Restores what `steps` returned."""

    def problems(self, settings: OptimizerSettings) -> Iterator[tuple[str, str]]:
        """(field of LevelConfig, remedy) for every setting that this optimizer cannot honour."""
        if settings.offload and not self.state_names(settings):
            without, give = (" without momentum", "give it momentum, ") if "momentum" in self.reads else ("", "")
            remedy = f"{self.name}{without} keeps no optimizer state: {give}use adamw, or offload=False"
            yield "offload", remedy


class AdamW(LevelOptimizer):
    """torch's AdamW; fused on GPUs."""

    name = "adamw"
    reads = ("betas", "eps")

    def state_names(self, settings: OptimizerSettings) -> tuple[str, ...]:
        """Both moments."""
        return ("exp_avg", "exp_avg_sq")

    def create(
        self, groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device
    ) -> torch.optim.Optimizer:
        """torch.optim.AdamW without weight decay."""
        import torch

        return torch.optim.AdamW(
            groups,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )

    def create_state(
        self, optimizer: torch.optim.Optimizer, masters: Sequence[torch.Tensor], settings: OptimizerSettings
    ) -> None:
        """Both moments and the step counter of the bias correction, which lies on the host unless AdamW is fused."""
        import torch

        super().create_state(optimizer, masters, settings)
        for master in masters:
            device = master.device if optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.state[master]["step"] = torch.zeros((), dtype=torch.float32, device=device)

    def steps(self, optimizer: torch.optim.Optimizer, masters: Sequence[torch.Tensor]) -> int:
        """Steps of the bias correction."""
        return int(optimizer.state[masters[0]]["step"].item())

    def set_steps(self, optimizer: torch.optim.Optimizer, masters: Sequence[torch.Tensor], steps: int) -> None:
        """Sets the step counter of every group."""
        for master in masters:
            optimizer.state[master]["step"].fill_(float(steps))


class SGD(LevelOptimizer):
    """torch's SGD, with momentum or without."""

    name = "sgd"
    reads = ("momentum",)

    def state_names(self, settings: OptimizerSettings) -> tuple[str, ...]:
        """The momentum, where there is one."""
        return ("momentum_buffer",) if settings.momentum else ()

    def create(
        self, groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device
    ) -> torch.optim.Optimizer:
        """torch.optim.SGD without weight decay."""
        import torch

        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


class Frozen(LevelOptimizer):
    """The optimizer of a frozen level: it never steps, but DeepSpeed shards no weights without an optimizer."""

    name = "frozen"

    def state_names(self, settings: OptimizerSettings) -> tuple[str, ...]:
        """None."""
        return ()

    def create(
        self, groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device
    ) -> torch.optim.Optimizer:
        """torch.optim.SGD without state."""
        import torch

        return torch.optim.SGD(groups, lr=settings.lr)


OPTIMIZERS: dict[str, LevelOptimizer] = {optimizer.name: optimizer for optimizer in (AdamW(), SGD())}
"""What LevelConfig.optimizer may name."""
FROZEN = Frozen()


def optimizer_of(settings: OptimizerSettings) -> LevelOptimizer:
    """The optimizer of a level with valid settings."""
    return FROZEN if settings.frozen else OPTIMIZERS[settings.optimizer]


def problems(settings: OptimizerSettings) -> Iterator[tuple[str, str]]:
    """(field of LevelConfig, remedy) for every setting that concerns the optimizer and cannot be honoured.

    Ranges are checked for every optimizer, also for one that does not read the setting.
    """
    optimizer = OPTIMIZERS.get(settings.optimizer)
    if optimizer is None:
        yield "optimizer", f"choose one of {', '.join(OPTIMIZERS)}"
    if not (len(settings.betas) == 2 and all(0 <= beta < 1 for beta in settings.betas)):
        yield "betas", "two numbers in [0, 1)"
    if not settings.eps > 0:
        yield "eps", "must be > 0"
    if not 0 <= settings.momentum < 1:
        yield "momentum", "must be in [0, 1)"
    if optimizer is not None:
        yield from optimizer.problems(settings)
