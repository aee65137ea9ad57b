"""Which answers are permanent, and what is said of them."""

import importlib.util
import re

import pytest

from pneumo import storage
from pneumo.errors import AccessError, StorageError, UserError
from pneumo.storage.failures import permanent_error
from tests.pneumo.storage.conftest import answer


def test_a_scheme_whose_package_is_missing_says_what_to_install() -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(UserError, match=r"gs://b/k: .*install gcsfs.*, on every node") as caught:
        storage.read_bytes("gs://b/k")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("NoSuchBucket", 404, "no such bucket: s3://b/k; create it first"),
        ("AccessDenied", 403, "no right to do this: s3://b/k; the key needs s3:GetObject"),
        ("InvalidAccessKeyId", 403, "unknown access key: s3://b/k; check AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "wrong secret key: s3://b/k; check AWS_SECRET_ACCESS_KEY"),
        ("RequestTimeTooSkewed", 403, "clock differs too much from the server's: s3://b/k; set"),
        ("ExpiredToken", 400, "session token has expired: s3://b/k; sign in again"),
        ("PermanentRedirect", 301, "in another region: s3://b/k; set AWS_DEFAULT_REGION"),
        ("InvalidObjectState", 403, "access to s3://b/k refused: InvalidObjectState"),
        ("404", 404, r"s3://b/k: .* not as an S3 server does \(HTTP 404\); check AWS_ENDPOINT_URL"),
        ("403", 403, r"s3://b/k: .* not as an S3 server does \(HTTP 403\); check AWS_ENDPOINT_URL"),
    ],
)
def test_a_refusal_says_which_and_what_to_do(code: str, status: int, message: str) -> None:
    permanent = permanent_error(answer(code, status), "s3://b/k")
    assert isinstance(permanent, AccessError)
    assert re.search(message, str(permanent))


@pytest.mark.parametrize(
    ("code", "status", "passes"),
    [
        ("AccessDenied", 403, False),
        ("InvalidIdentityToken", 400, False),
        ("ExpiredTokenException", 400, False),
        ("ValidationError", 400, False),
        ("IDPCommunicationError", 400, True),
        ("Throttling", 400, True),
        ("ServiceUnavailable", 503, True),
        ("InternalFailure", 500, True),
    ],
)
def test_a_role_that_may_be_had_later_is_asked_for_again(
    code: str, status: int, passes: bool
) -> None:
    permanent = permanent_error(answer(code, status, "AssumeRoleWithWebIdentity"), "s3://b/k")
    assert permanent is None if passes else isinstance(permanent, AccessError)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("SlowDown", 503, None),
        ("InternalError", 500, None),
        ("502", 502, None),
        ("RequestTimeout", 400, None),
        ("BadDigest", 400, None),
        ("429", 429, None),
        ("NoSuchKey", 404, FileNotFoundError),
        ("EntityTooLarge", 400, StorageError),
        ("KeyTooLongError", 400, StorageError),
        ("NotImplemented", 501, StorageError),
    ],
)
def test_only_what_may_pass_is_waited_for(
    code: str, status: int, kind: type[Exception] | None
) -> None:
    permanent = permanent_error(answer(code, status), "s3://b/k")
    assert permanent is None if kind is None else type(permanent) is kind
