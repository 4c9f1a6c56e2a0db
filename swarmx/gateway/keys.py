"""Who may do what: bearer tokens, kept as hashes, with a role and a tenant each."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from swarmx.core import failpoints
from swarmx.core.control import Actor, Role
from swarmx.core.errors import ConfigError, Forbidden, NotFound, Unauthorized, Unavailable

log = logging.getLogger(__name__)

Right = Literal["submit", "read", "read_all", "control", "keys"]

RIGHTS: Mapping[Role, frozenset[Right]] = {
    "client": frozenset({"submit", "read"}),
    "viewer": frozenset({"read", "read_all"}),
    "operator": frozenset({"submit", "read", "read_all", "control"}),
    "admin": frozenset({"submit", "read", "read_all", "control", "keys"}),
}
_LOOK_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One token's holder. The token itself is not kept."""

    name: str
    role: Role
    tenant: str
    sha256: str

    def require(self, right: Right) -> None:
        """Raises Forbidden when the role lacks the right."""
        if right not in RIGHTS[self.role]:
            allowed = ", ".join(role for role, rights in RIGHTS.items() if right in rights)
            raise Forbidden(f"the key {self.name!r} has the role {self.role!r}; this needs one of: {allowed}.")

    @property
    def actor(self) -> Actor:
        """Who acts with this key."""
        return Actor(type="key", name=self.name, role=self.role)

    @property
    def sees(self) -> str | None:
        """The tenant whose things this key may see; None for all."""
        return None if "read_all" in RIGHTS[self.role] else self.tenant


class Keyring:
    """The keys in a file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._looked_s = float("-inf")

    def check(self, authorization: str | None) -> Key:
        """The key behind an `Authorization: Bearer ...` header. Raises Unauthorized, Unavailable."""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("no token. Send `Authorization: Bearer TOKEN`; `swarmx keys add` makes one.")
        digest = _digest(token.strip())
        try:
            self._load()
        except Unavailable as error:
            log.error("%s", error)  # names a path, which is not for clients
            raise Unavailable("the keys cannot be read; the server's log says why.") from None
        for key in self._keys.values():
            if hmac.compare_digest(key.sha256, digest):
                return key
        raise Unauthorized("unknown token. It may have been revoked; `swarmx keys add` makes a new one.")

    def all(self) -> list[Key]:
        """All keys, by name."""
        self._load()
        return sorted(self._keys.values(), key=lambda key: key.name)

    def add(self, name: str, role: Role, tenant: str, *, keep: Callable[[str], None] | None = None) -> str:
        """Make a key; returns its token, which is not kept and cannot be shown again. Raises ConfigError.

        `keep` gets the token before it counts, so that a crash leaves no key whose token nobody has.
        """
        for what, value in (("name", name), ("tenant", tenant)):
            if not _NAME.fullmatch(value):
                raise ConfigError(f"{what} {value!r}: use up to 64 letters, digits, dots, dashes and underscores.")
        with self._changing():
            if name in self._keys:
                raise ConfigError(f"there is a key {name!r} already; revoke it first or choose another name.")
            token = f"swx-{secrets.token_urlsafe(32)}"
            if keep is not None:
                keep(token)
                failpoints.hit("keys.token")
            self._keys[name] = Key(name=name, role=role, tenant=tenant, sha256=_digest(token))
        return token

    def add_first(self) -> None:
        """Without an admin key make one, and leave its token in `admin.token` beside the keys, for who runs the server.

        Of several that a crash cut short the file has the token of the one that counts.
        """
        if not any(key.role == "admin" for key in self.all()):
            file = self._path.with_name("admin.token")
            self.add("admin", "admin", "default", keep=lambda token: write_private(file, token.encode()))

    def revoke(self, name: str) -> None:
        """Forget a key. Raises NotFound."""
        with self._changing():
            if self._keys.pop(name, None) is None:
                raise NotFound(f"there is no key {name!r}; there are: {', '.join(sorted(self._keys)) or 'none'}.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside the block the keys are as they are on disk, and no other process changes them; then they are saved."""
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._looked_s, self._stamp = float("-inf"), None
            self._load()
            yield
            os.fsync(lock)  # what the block left beside the keys outlives a crash before they do
            write_private(self._path, msgspec.json.encode(list(self._keys.values())))
            os.fsync(lock)
        finally:
            self._looked_s, self._stamp = float("-inf"), None
            os.close(lock)

    def _load(self) -> None:
        """Read the file again when it has changed, so that a running server honours `swarmx keys` within a second."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._keys, self._stamp = {}, None
            return
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._stamp:
            try:
                keys = msgspec.json.decode(self._path.read_bytes(), type=list[Key])
            except msgspec.MsgspecError as error:
                self._looked_s = float("-inf")
                raise Unavailable(f"{self._path} is not a file of keys ({error}); restore or delete it.") from None
            self._keys, self._stamp = {key.name: key for key in keys}, stamp


def write_private(path: Path, data: bytes) -> None:
    """Replace a file at once, readable by its owner only."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()  # a header may have any bytes
