"""How an object reaches S3: in parts side by side, each with its checksum."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from typing_extensions import Buffer

from accelx.storage_at import Store, filesystem, path_of, protocols
from accelx.storage_blocks import blocks
from accelx.storage_retry import PassingError, attempt, code_of

MIB = 2**20
PART = 8 * MIB
MEMORY = 64 * MIB  # of all parts under way; one connection carries about 80 MB/s
MAX_PARTS = 10_000  # S3's own limit
PLAIN_ETAG = re.compile(r"[0-9a-f]{32}")


def speaks(fs: Any) -> bool:
    """Whether `fs` is s3fs."""
    return "s3" in protocols(fs) and hasattr(fs, "call_s3")


def part_of(size: int) -> int:
    """Bytes in a part: more than PART only where there would be too many of them."""
    return max(PART, -(-size // (MAX_PARTS * MIB)) * MIB)


def upload(store: Store, name: str, parts: Iterable[Buffer], size: int) -> None:
    """Write `size` bytes as one object; it is visible when it is whole, or never."""
    url = f"{store.url}/{name}"
    if size > PART:
        _multipart(store, name, blocks(url, parts, size, part_of(size)), size)
        return
    (block,) = blocks(url, parts, size, PART)

    def put() -> None:
        digest = _digest(filesystem(store), block)
        reply = _call(store, name, "put_object", Body=block, **digest)
        _compare(url, reply, block, digest)

    attempt(store, name, "write", put)


def _multipart(store: Store, name: str, cut: Iterable[bytes], size: int) -> None:
    def begin() -> str:
        crc = {"ChecksumAlgorithm": "CRC32"} if _has_crc(filesystem(store)) else {}
        return _call(store, name, "create_multipart_upload", **crc)["UploadId"]

    upload_id = attempt(store, name, "write", begin)
    try:
        sent = _send_all(store, name, upload_id, cut, max(2, MEMORY // part_of(size)))
        attempt(store, name, "write", lambda: _finish(store, name, upload_id, sent))
    except BaseException as error:
        _abort(store, name, upload_id, error)
        raise


def _send_all(
    store: Store, name: str, upload_id: str, cut: Iterable[bytes], width: int
) -> list[dict[str, Any]]:
    """Send the blocks; `width` of them are in memory, the one being filled included."""
    flying: deque[Future[dict[str, Any]]] = deque()
    sent: list[dict[str, Any]] = []
    pool = ThreadPoolExecutor(width, thread_name_prefix="accelx-s3")
    try:
        for number, block in enumerate(cut, 1):
            flying.append(pool.submit(_send, store, name, upload_id, number, block))
            if len(flying) == width:
                sent.append(flying.popleft().result())
        sent.extend(future.result() for future in flying)
    finally:
        pool.shutdown(cancel_futures=True)
    return sent


def _send(
    store: Store, name: str, upload_id: str, number: int, block: bytes
) -> dict[str, Any]:
    def send() -> dict[str, Any]:
        digest = _digest(filesystem(store), block)
        part = {"UploadId": upload_id, "PartNumber": number}
        reply = _call(store, name, "upload_part", Body=block, **part, **digest)
        _compare(f"part {number} of {store.url}/{name}", reply, block, digest)
        crc = {k: reply[k] for k in ("ChecksumCRC32",) if k in reply and k in digest}
        return {"PartNumber": number, "ETag": reply["ETag"], **crc}

    return attempt(store, name, "write", send)


def _finish(
    store: Store, name: str, upload_id: str, sent: list[dict[str, Any]]
) -> None:
    """Make one object of the parts."""
    parts = {"UploadId": upload_id, "MultipartUpload": {"Parts": sent}}
    _end(store, name, "complete_multipart_upload", **parts)


def _abort(store: Store, name: str, upload_id: str, why: BaseException) -> None:
    """Let the store forget the parts, which are paid for until then."""

    def abort() -> None:
        _end(store, name, "abort_multipart_upload", UploadId=upload_id)

    try:
        attempt(store, name, "abort writing", abort)
    except OSError as error:
        why.add_note(f"The parts that were sent are still stored: {error}")


def _end(store: Store, name: str, method: str, **kwargs: Any) -> None:
    """End an upload, which may have ended before, where that answer was lost.

    Whether there is an object then, the caller looks in any case.
    """
    try:
        _call(store, name, method, **kwargs)
    except Exception as error:
        if code_of(error) != "NoSuchUpload":
            raise


def _has_crc(fs: Any) -> bool:
    """Whether botocore is set to send checksums, which some other stores refuse."""
    setting = getattr(fs.s3.meta.config, "request_checksum_calculation", "")
    return setting == "when_supported"


def _digest(fs: Any, block: bytes) -> dict[str, str]:
    """The arguments that let the store check what comes."""
    if _has_crc(fs):
        crc = base64.b64encode(zlib.crc32(block).to_bytes(4, "big"))
        return {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": crc.decode()}
    md5 = hashlib.md5(block, usedforsecurity=False).digest()
    return {"ContentMD5": base64.b64encode(md5).decode()}


def _compare(
    what: str, reply: dict[str, Any], block: bytes, digest: dict[str, str]
) -> None:
    """Refuse a reply that tells of other bytes than those of `block`."""
    sent = digest.get("ChecksumCRC32")
    came = reply.get("ChecksumCRC32")
    if not (sent and came):
        came = reply.get("ETag", "").strip('"')
        if reply.get("ServerSideEncryption") or not PLAIN_ETAG.fullmatch(came):
            return  # such an ETag is no MD5
        sent = hashlib.md5(block, usedforsecurity=False).hexdigest()
    if sent != came:
        raise PassingError(
            f"{what} wants the checksum {sent}, but the store has {came}; "
            "look at the network between, which changes bytes"
        )


class _Stream(io.BytesIO):
    """A stream that shares the memory of `block`, and goes on sharing it.

    aiohttp looks at `getbuffer` for the length, where BytesIO makes a copy of its own.
    """

    def __init__(self, block: bytes) -> None:
        super().__init__(block)
        self._block = block

    def getbuffer(self) -> memoryview:
        return memoryview(self._block)


def _call(store: Store, name: str, method: str, **kwargs: Any) -> dict[str, Any]:
    """One request through the client of s3fs.

    Not through `call_s3`, which calls again with a Body that was read in part. The body
    is a stream, as aiohttp wants it, which shares the memory of the bytes; one for each
    attempt, since the one before may still be read from.
    """
    from fsspec.asyn import sync

    fs = filesystem(store)
    bucket, key, _ = fs.split_path(path_of(store, name))
    if "Body" in kwargs:
        kwargs["Body"] = _Stream(kwargs["Body"])

    async def request() -> dict[str, Any]:
        await fs.set_session()
        client = await fs.get_s3(bucket)
        operation = client.meta.method_to_api_mapping[method]
        known = client.meta.service_model.operation_model(operation).input_shape.members
        every = {**fs.s3_additional_kwargs, **fs.req_kw}  # encryption, who pays
        extra = {k: v for k, v in every.items() if k in known and v is not None}
        call = getattr(client, method)
        return await call(**{**extra, "Bucket": bucket, "Key": key, **kwargs})

    reply: Any = sync(fs.loop, request)
    return reply
