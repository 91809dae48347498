"""Every error that accelx raises on purpose, as one tree.

    AccelxError
      DetectError           launcher variables that contradict each other (ValueError)
      OrderError            a chain whose order breaks a rule (ValueError)
      PlacementError        a model or optimizer that cannot be placed (ValueError)
      PrecisionError        a precision unknown, or not obtained (ValueError)
      UnusedParameterError  trainable parameters without gradient or optimizer
      LossError             a loss that is no scalar, Tensor or Mean (ValueError)
      DataError             a loader or batch that cannot be cut exactly (ValueError)
      CollectiveError       ranks that would not meet in a collective (RuntimeError)
      SpentStateError       a state that was used before (RuntimeError)
      SpawnError            ranks that could not be started, or failed (RuntimeError)
      MissingExtraError     an optional package that is not installed (ImportError)
      StorageError          a store that did not do what it was asked (OSError)
      CheckpointError       a checkpoint that cannot be written or read as asked
        DamagedError        a checkpoint whose bytes are not those that were saved

Each message has three parts: what was wanted, what came, what to write instead.
"""


class AccelxError(Exception):
    """Base of every error that accelx raises on purpose."""


class DetectError(AccelxError, ValueError):
    """The launcher's variables are partial or contradict each other."""


class OrderError(AccelxError, ValueError):
    """A chain breaks an order rule of one of its passes."""


class PlacementError(AccelxError, ValueError):
    """A model, or an optimizer over it, cannot be placed as asked."""


class PrecisionError(AccelxError, ValueError):
    """A precision is unknown, not to be had here, or was not obtained."""


class LossError(AccelxError, ValueError):
    """A loss function returned something that is no scalar loss."""


class DataError(AccelxError, ValueError):
    """A loader or a batch cannot be cut over ranks exactly."""


class CollectiveError(AccelxError, RuntimeError):
    """Ranks would not meet in a collective, or brought different trees to it."""


class SpentStateError(AccelxError, RuntimeError):
    """A state was read after a step had used it."""


class SpawnError(AccelxError, RuntimeError):
    """Ranks could not be started, or one of them failed.

    `error` is the exception of the rank that failed first, where it could be brought.
    """

    error: Exception | None = None


class MissingExtraError(AccelxError, ImportError):
    """An optional package is needed and not installed."""


class StorageError(AccelxError, OSError):
    """A store did not do what it was asked: a short read, a size that is not so."""


class CheckpointError(AccelxError, RuntimeError):
    """A checkpoint cannot be written or read as asked."""


class DamagedError(CheckpointError):
    """A checkpoint's bytes are not those that were saved."""


class UnusedParameterError(AccelxError, ValueError):
    """Trainable parameters got no gradient, or no optimizer moves them."""


class NeutralityWarning(UserWarning):
    """Something in the model makes its numbers depend on the number of ranks."""


class CheckpointWarning(UserWarning):
    """Something about a checkpoint that its user should know of."""
