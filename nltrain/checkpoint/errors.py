"""What can go wrong with a checkpoint, one type per remedy."""

from nltrain.errors import UserError


class CheckpointError(UserError):
    """Base of everything this package raises; the message names the checkpoint, the value and the remedy."""


class ShareError(CheckpointError):
    """The ranks' fragments do not make up whole tensors: overlaps disagree, or elements are held by nobody."""


class CorruptCheckpointError(CheckpointError):
    """The stored bytes are not the ones that were committed; an older checkpoint may be taken instead."""


class MismatchError(CheckpointError):
    """A sound checkpoint that does not fit what asks for it: missing entries, other shapes, other dtypes."""


class ConfigChangedError(CheckpointError):
    """The stored run was configured differently in a way that would change the training."""


class SaveFailedError(CheckpointError):
    """A save did not complete; the previous checkpoint is untouched."""


class StaleAttemptError(SaveFailedError):
    """A newer attempt of this run has started; this one may not commit any more and must stop."""
