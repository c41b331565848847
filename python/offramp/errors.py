"""The exceptions a user of offramp can meet; every module may import this one."""

from __future__ import annotations


class OfframpError(Exception):
    """Base of every error offramp raises on purpose; the message is one sentence that says what to change."""


class InputError(OfframpError, ValueError):
    """A value handed to offramp is at fault."""


class ModelError(OfframpError):
    """The language model cannot be given exits, or is not the one the exits were trained on."""


class StorageError(OfframpError):
    """A folder or file on disk is missing, damaged, or belongs to something else."""


class AgreementError(OfframpError):
    """Early tokens are shown to agree with the whole model less often than they should; see `offramp.Monitor`."""


class OutOfMemoryError(OfframpError, MemoryError):
    """There was no memory to run a part of the model in; whatever was running can go on once there is."""
