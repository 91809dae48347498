"""Which failures of a store pass by themselves, and how long that is waited for."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from accelx.errors import AccelxError, StorageError
from accelx.storage_at import Store, filesystem, scrubbed

T = TypeVar("T")

# Above the retries that botocore and gcsfs make themselves. Waits are random up to
# twice the one before, so that the ranks of a job do not come back all at once.
ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds, at most
LONGEST_WAIT = 10.0  # seconds
PATIENCE = 90.0  # seconds, after which no new attempt is made

STATUSES = {408, 429, 500, 502, 503, 504}
CODES = {  # of S3, where some servers send them with another status
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
ERRNOS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
}
# By name, so that no optional package is imported to ask whether an error is its own.
CLASSES = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "azure.ServiceRequestError",
    "azure.ServiceResponseError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "botocore.IncompleteReadError",
    "gcsfs.ChecksumError",
    "requests.ChunkedEncodingError",
    "requests.ConnectionError",
    "requests.Timeout",
    "urllib3.ProtocolError",
}
FINAL = (FileExistsError, FileNotFoundError, PermissionError)


class PassingError(StorageError):
    """What accelx itself found wrong in a store's answer, and may not be next time."""


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    return any(_passes(each) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from; none where it is final in itself."""
    while error is not None and not isinstance(error, FINAL):
        yield error
        error = error.__cause__


def _passes(error: BaseException) -> bool:
    if isinstance(error, PassingError | ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in ERRNOS:
        return True
    if status_of(error) in STATUSES or code_of(error) in CODES:
        return True
    names = {
        f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(error).mro()
    }
    return bool(names & CLASSES)


def code_of(error: BaseException) -> str:
    """What S3 calls the error, "" if it says nothing."""
    return _reply(error).get("Error", {}).get("Code", "")


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of any of the packages was made from."""
    if reply := _reply(error):
        return reply.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdecimal():
            return int(value)
    return None


def _reply(error: BaseException) -> dict[str, Any]:
    """What botocore keeps of S3's answer."""
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def attempt(
    store: Store, name: str, verb: str, call: Callable[[], T], again: bool = True
) -> T:
    """What `call` returns, called again while it fails in passing, if `again`.

    Raises FileNotFoundError where the store has no such object, StorageError for
    whatever else it says. Neither carries the error it was made from, whose text may
    hold credentials.
    """
    import tenacity

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(transient),
        stop=tenacity.stop_after_attempt(ATTEMPTS if again else 1)
        | tenacity.stop_after_delay(PATIENCE),
        wait=tenacity.wait_random_exponential(FIRST_WAIT, LONGEST_WAIT),
        reraise=True,
    )
    held = [call]
    try:
        return retrying(lambda: held[0]())
    except AccelxError:
        raise
    except Exception as error:
        count = retrying.statistics.get("attempt_number", 1)
        failure = _worded(store, name, verb, error, count)
    finally:
        held.clear()  # tenacity's objects are a circle, which would keep a part's bytes
    raise failure  # outside of the handler, so that the error is no context of it


def _worded(
    store: Store, name: str, verb: str, error: Exception, count: int
) -> OSError:
    where = f"{store.url}/{name}" if name else store.url
    if isinstance(error, FileNotFoundError) and verb != "write":
        return FileNotFoundError(
            errno.ENOENT, f"{where} does not exist; look at the URL and its listing"
        )
    text = scrubbed(f"{type(error).__name__}: {error}", filesystem(store))
    tries = f"failed {count} times, the last with" if count > 1 else "said"
    if transient(error):
        write = "wait until the store answers, then call again"
    elif isinstance(error, PermissionError) or status_of(error) in (401, 403):
        write = "look whether its credentials may do that"
    else:
        write = "look at the URL, and at the store's settings in fsspec's configuration"
    failure = StorageError(
        f"to {verb} {where} was wanted, but it {tries} {text}; {write}"
    )
    failure.errno = getattr(error, "errno", None)
    return failure
