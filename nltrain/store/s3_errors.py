"""What botocore's errors mean: which are worth another try, and one line with the remedy for the others."""

from typing import Any

from nltrain.store.base import NEEDED_STORE, MissingObjectError, StoreError

NOT_IMPLEMENTED = 501


class ShortBodyError(Exception):
    """Fewer or more bytes arrived than were asked for."""


def refused_delete(entry: dict[str, Any]) -> Exception:
    """What an answer with status 200 says of one object, as the error it would have been alone."""
    from botocore.exceptions import ClientError

    code = entry.get("Code", "")
    status = {"InternalError": 500, "SlowDown": 503, "ServiceUnavailable": 503}.get(code, 403)
    detail = {"Code": code, "Message": f"{entry.get('Key')}: {entry.get('Message', '')}"}
    return ClientError({"Error": detail, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")


def one_line(error: BaseException) -> str:
    """The error's type and text without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_transient(error: Exception) -> bool:
    """Whether another try may succeed."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        names = {"RequestTimeout", "SlowDown", "ConditionalRequestConflict", "RequestTimeTooSkewed"}
        return (status >= 500 and status != NOT_IMPLEMENTED) or status == 429 or code in names
    kinds = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        exceptions.FlexibleChecksumError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
    )
    # ResponseParserError: an XML answer cut in the middle.
    return isinstance(error, (*kinds, ResponseParserError, HTTPError, ShortBodyError, ConnectionError, TimeoutError))


def explain(url: str, verb: str, error: Exception, region: str) -> StoreError:
    """A StoreError with the URL, what failed and the remedy, for an error that another try does not cure."""
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
        return StoreError(f"{url}: {verb}: no AWS credentials found: {remedy}")
    if not isinstance(error, exceptions.ClientError):
        return StoreError(f"{url}: {verb}: {one_line(error)}: check the URL and the AWS_* variables")
    code = error.response.get("Error", {}).get("Code", "")
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == NOT_IMPLEMENTED:
        what = "an atomic create (PUT with If-None-Match: *)" if verb == "put_if_absent" else "this request"
        return StoreError(f"{url}: {verb}: the store at this endpoint does not know {what} ({code}): {NEEDED_STORE}")
    if code == "NoSuchBucket":
        return StoreError(f"{url}: {verb}: the bucket does not exist: create it or correct the URL")
    if code in ("NoSuchKey", "404", "NotFound"):
        return MissingObjectError(f"{url}: {verb}: no such object: check the URL")
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        named = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
        wanted = f"AWS_REGION={named}" if named else "AWS_REGION to the bucket's region"
        return StoreError(f"{url}: {verb}: the bucket is not in region {region!r} ({code}): set {wanted}")
    if code in ("AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        return StoreError(f"{url}: {verb}: access refused ({code}): check the credentials and the bucket's policy")
    return StoreError(f"{url}: {verb}: {one_line(error)}: check the URL and the AWS_* variables")
