"""Every error that a user can meet.

    PneumoError               exit 1: something failed
    ├── UserError             exit 2: the user's mistake; the message says what to change
    │   └── ConfigError, SourceError, StoreError, RunError, AccessError
    │       └── DeniedError
    ├── DataError, BadFilesError, DicomError, CheckpointError, DivergedError, ClusterError,
    │   MetricError, TrackingError
    ├── PreemptedError        exit 130: told to stop; all that was trained is in a checkpoint
    └── StorageError
        └── ContentError
            └── TooLargeError

Each takes its message as the only positional argument, so that it survives pickling between Ray
processes. A message is one line: where, got, expected, what to do. Nothing from a patient's header
ever stands in it.
"""

from typing import ClassVar, Literal

INTERRUPTED = "interrupted; repeat the command to resume from what is finished"
"""The last line of a job that was told to stop and did."""


class PneumoError(Exception):
    """Base of every error of this package; `exit_code` is what a job's process exits with."""

    exit_code: ClassVar[int] = 1


class UserError(PneumoError):
    """A mistake that the user can correct."""

    exit_code: ClassVar[int] = 2


class ConfigError(UserError):
    """A setting is unknown or its value is not allowed."""


class SourceError(UserError):
    """The source folder, one of its tables or a column is missing or unreadable."""


class StoreError(UserError):
    """The store is absent, empty, unreadable, or not the one that was asked for."""


class RunError(UserError):
    """The run folder holds something that the job must not touch, or lacks what it needs."""


class FinishedError(RunError):
    """The job has nothing left to do."""


class AccessError(UserError):
    """The storage refuses: no credentials, no right, or no such bucket."""


class DeniedError(AccessError):
    """The storage refuses an object, perhaps this one alone, to a key that it knows."""


class DataError(PneumoError):
    """Bytes, sizes or counts differ from what the manifest says."""


class BadFilesError(PneumoError):
    """More studies had to be quarantined than the policy allows."""


class CheckpointError(PneumoError):
    """A checkpoint is corrupt, incomplete or of another schema."""


class DivergedError(PneumoError):
    """The loss became NaN or infinite."""


class PreemptedError(PneumoError):
    """Training was told to stop and did, after a checkpoint: the same command goes on from it."""

    exit_code: ClassVar[int] = 130


class ClusterError(PneumoError):
    """The cluster cannot be reached, or lacks the resources that the job asks for."""


class MetricError(PneumoError):
    """A metric is undefined for the given targets and scores."""


class TrackingError(PneumoError):
    """W&B did not get all of a run; the run's folder still has it."""


class StorageError(PneumoError):
    """The storage failed for longer than the retry budget."""


class ContentError(StorageError):
    """What lies at a URL is not what the caller expects: another digest or size, or too short."""


class TooLargeError(ContentError):
    """An object has more bytes than the caller takes; it was not read."""


DicomReason = Literal[
    "not_dicom",
    "wrong_class",
    "no_pixels",
    "multi_frame",
    "too_large",
    "photometric",
    "no_decoder",
    "undecodable",
    "blank",
    "not_frontal",
    "not_chest",
]


class DicomError(PneumoError):
    """One DICOM file cannot be used; `reason` is the code that the quarantine list carries."""

    def __init__(self, message: str, reason: DicomReason = "undecodable") -> None:
        super().__init__(message, reason)
        self.reason: DicomReason = reason

    def __str__(self) -> str:
        return str(self.args[0])
