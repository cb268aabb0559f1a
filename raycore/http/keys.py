"""The optional API key: kept as a digest, compared in constant time. Without one, administration is closed."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from raycore.config import API_KEY_VARIABLE
from raycore.http.errors import HttpError


def digest_of(key: str | None) -> bytes | None:
    """What is kept of a key; None where there is none."""
    return hashlib.sha256(key.encode()).digest() if key else None


class KeyGuard:
    """Checks `Authorization: Bearer KEY`."""

    def __init__(self, digest: bytes | None) -> None:
        self._digest = digest

    def check(self, headers: Iterable[tuple[bytes, bytes]], *, is_administration: bool) -> None:
        """Raise HttpError: 401 for a key that is missing or wrong, 403 for administration where the server has no key."""
        if self._digest is None:
            if is_administration:
                message = f"administrative routes are closed on a server without an API key ({API_KEY_VARIABLE})"
                raise HttpError(403, message, kind="permission_error", code="administration_closed")
            return
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # of digests, so that neither the place of the first difference nor the length of the key can be timed
        is_right = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._digest)
        if scheme.lower() != b"bearer" or not is_right:
            message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise HttpError(401, message, kind="authentication_error", code="invalid_api_key", headers={"www-authenticate": "Bearer"})
