"""Which errors of a server are permanent, and their messages for the user."""

import errno
from collections.abc import Mapping
from typing import Any

from pneumo.errors import AccessError, DeniedError, StorageError, UserError
from pneumo.storage.connection import ANONYMOUS

_REFUSALS: Mapping[str, tuple[str, str]] = {
    "NoSuchBucket": ("no such bucket", "create it first, or correct its name"),
    "InvalidBucketName": ("not a bucket's name", "correct it"),
    "AccessDenied": (
        "no right to do this",
        "the key needs s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there",
    ),
    "InvalidAccessKeyId": (
        "unknown access key",
        "check AWS_ACCESS_KEY_ID or AWS_PROFILE, and that AWS_ENDPOINT_URL names the server that "
        "issued it",
    ),
    "SignatureDoesNotMatch": (
        "wrong secret key",
        "check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    ),
    "RequestTimeTooSkewed": (
        "this machine's clock differs too much from the server's",
        "set it right, by NTP for instance",
    ),
    "ExpiredToken": ("the session token has expired", "sign in again"),
    "TokenRefreshRequired": ("the session token has expired", "sign in again"),
    "InvalidToken": ("invalid session token", "sign in again, or unset AWS_SESSION_TOKEN"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_DEFAULT_REGION to it"),
    "AuthorizationHeaderMalformed": ("wrong region", "set AWS_DEFAULT_REGION to the bucket's"),
}
"""S3 error code -> what is wrong, what to do."""

_TRANSIENT_CODES = frozenset(
    {
        *("SlowDown", "Throttling", "TooManyRequests", "429", "RequestTimeout", "408"),
        *("OperationAborted", "ConditionalRequestConflict", "409", "PreconditionFailed", "412"),
        *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),
        *("ThrottlingException", "RequestLimitExceeded", "IDPCommunicationError"),
    }
)
"""4xx errors that are transient: overload, bytes that were changed on the network, and an identity
provider that the server of roles cannot reach."""

_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError"})
_BAD_SETUP = frozenset(
    {"ProfileNotFound", "ConfigParseError", "InvalidRegionError", "ParamValidationError"}
)
"""Class names of botocore's errors; botocore is imported only where S3 is used."""
_PROGRAM_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, NameError, AssertionError),
    *(ArithmeticError, NotImplementedError),
)
"""Bugs in this program or in a library: permanent."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def has_no_credentials(error: Exception) -> bool:
    """Whether no credentials were found, which also a metadata service that fails looks like."""
    return type(error).__name__ in _NO_CREDENTIALS


def permanent_error(error: Exception, name: str, text: str | None = None) -> Exception | None:
    """The error to raise for a permanent `error`; None for a transient one.

    `name` names the object in messages, `text` is the error's message: by default its first line.
    """
    if isinstance(error, (StorageError, UserError)):
        return error
    if isinstance(error, ImportError):  # fsspec's message says what to install
        return UserError(f"storage: {name}: {first_line(error)}, on every node of the cluster")
    text = first_line(error) if text is None else text
    code, operation = s3_error(error)
    if code is not None:
        return _permanent_s3_error(error, code, operation, name, text)
    kind = type(error).__name__
    if has_no_credentials(error):
        return AccessError(
            f"storage: no credentials for {name}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY, or {ANONYMOUS}=1 for a public bucket"
        )
    if kind in _BAD_SETUP:
        return AccessError(f"storage: {name}: {text}")
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return AccessError(f"storage: {name}: {text}; AWS_ENDPOINT_URL must be http(s)://host:port")
    if any(sign in str(error) for sign in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")):
        return AccessError(
            f"storage: {name}: {text}; check http or https in AWS_ENDPOINT_URL, or set "
            "AWS_CA_BUNDLE and SSL_CERT_FILE"
        )
    if isinstance(error, FileNotFoundError):
        return _no_such_object(name)
    if isinstance(error, PermissionError):
        return DeniedError(f"storage: access to {name} refused: {text}")
    if isinstance(error, _PROGRAM_ERRORS):
        return StorageError(f"storage: {name}: {kind}: {text}")
    return None


def _permanent_s3_error(
    error: Exception, code: str, operation: str, name: str, text: str
) -> Exception | None:
    """`permanent_error` for an answer of an S3 server, or of another HTTP server."""
    status = _s3_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if operation.startswith("AssumeRole"):
        # "Couldn't retrieve verification key from your identity provider": it may be reached later.
        if status >= 500 or code in _TRANSIENT_CODES or "verification key" in str(error):
            return None
        return AccessError(
            f"storage: no credentials for {name}: the role of AWS_ROLE_ARN was refused: {code}"
        )
    if code in _REFUSALS:
        what, remedy = _REFUSALS[code]
        kind = DeniedError if code == "AccessDenied" else AccessError
        return kind(f"storage: {what}: {name}; {remedy}")
    if code in _TRANSIENT_CODES:
        return None
    if code.isdecimal():
        # An HTTP status: the answer had no body with S3's code, as is usual for HEAD.
        if int(code) >= 500 and code != "501":
            return None
        if not operation.startswith("Head"):
            return not_s3(name, f" (HTTP {code})")
    if isinstance(error, FileNotFoundError):
        return _no_such_object(name)
    if isinstance(error, PermissionError):
        return DeniedError(f"storage: access to {name} refused: {code}")
    if 400 <= status < 500 or status == 501:
        return StorageError(f"storage: {name}: the server refuses: {code}: {text}")
    return None


def _no_such_object(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such object", name)


def not_s3(name: str, answer: str = "") -> AccessError:
    """The error for a server that speaks HTTP, but not S3."""
    return AccessError(
        f"storage: {name}: something answered, but not as an S3 server does{answer}; check "
        "AWS_ENDPOINT_URL"
    )


def s3_error(error: BaseException) -> tuple[str | None, str]:
    """Code and operation of botocore's ClientError, which s3fs wraps in one of Python's errors.

    Not parsed from the message, which may quote a key that looks like a code.
    """
    source = error if getattr(error, "response", None) else error.__cause__
    code = _s3_response(error).get("Error", {}).get("Code")
    return code, getattr(source, "operation_name", "")


def _s3_response(error: BaseException) -> Mapping[str, Any]:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}
