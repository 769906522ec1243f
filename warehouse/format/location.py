"""Where a version lies: in a folder, or below a prefix of an object store or web server.

`Remote` offers as much of `pathlib.Path` as reading a version requires, through obstore. Objects
are fetched whole. Invariant: what is returned has the size that the store declared or that the
caller expects; the caller compares digests and seals. A `Remote` that was made from a URL pickles
as that URL, and each process takes its credentials from its environment, as obstore documents them
(AWS_*, GOOGLE_*, AZURE_*). One that was made from an obstore store pickles with it. Given up:
writing, listing and reading byte ranges. The URLs are those of
https://developmentseed.org/obstore/latest/getting-started/.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from warehouse.errors import ConfigError, CorruptError, StoreError

__all__ = ["Location", "Remote", "location_of", "zarr_store"]

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
TIMEOUT_S = 300
"""Limit for fetching one object, in seconds.

A stored chunk is fetched whole, and obstore's 30 s are too few for 128 MiB on a slow line.
"""
STREAM_BYTES = 4 << 20
REMEDY = "check the address and the network, or copy the version to a local disk and open it there"


class Remote:
    """An object, or the prefix of several.

    As for a path, `/` leads below it. Errors show its `str`, which has neither the user name and
    password nor the query of a URL.

    Parameters
    ----------
    url
        URL of the prefix that everything lies below.
    store
        An obstore store instead of a URL.
    key
        Name of the object or prefix below either.
    """

    # obstore is an optional dependency without types that could be imported here.
    def __init__(self, url: str | None = None, store: Any = None, key: str = "") -> None:
        assert (url is None) != (store is None)
        self.url, self.own_store, self.key = url, store, key
        self._opened: Any = store

    @property
    def store(self) -> Any:
        """The obstore store, which is opened when it is first needed.

        Raises
        ------
        StoreError
            obstore is not installed, or does not know the URL.
        """
        if self._opened is None:
            try:
                from obstore.store import from_url
            except ImportError:
                raise StoreError(
                    "reading a URL needs obstore",
                    where=self,
                    remedy="pip install 'tensor-warehouse[cloud]'",
                ) from None
            options: dict[str, Any] = {"timeout": f"{TIMEOUT_S}s"}
            # obstore refuses plain HTTP unless told otherwise; who types such a URL means it.
            if str(self.url).startswith("http://"):
                options["allow_http"] = True
            try:
                self._opened = from_url(self.url, client_options=options)
            except Exception as error:
                raise StoreError(
                    "this URL cannot be opened", where=self, found=first_line(error), remedy=REMEDY
                ) from None
        return self._opened

    @property
    def name(self) -> str:
        """The last part of the key or URL."""
        return PurePosixPath(self.key or urlsplit(self.url or "").path).name

    @property
    def parent(self) -> Remote:
        """What this lies below."""
        if self.key:
            above = PurePosixPath(self.key).parent.as_posix()
            return self._at("" if above == "." else above)

        # Here the URL itself is that of a manifest.json or a version folder.
        assert self.url is not None
        return Remote(self.url.rstrip("/").rsplit("/", 1)[0])

    def __truediv__(self, below: str | PurePath) -> Remote:
        return self._at((PurePosixPath(self.key) / PurePath(below).as_posix()).as_posix())

    def _at(self, key: str) -> Remote:
        below = Remote(self.url, self.own_store, key)
        # Shared, so that one version has one pool of connections.
        below._opened = self._opened
        return below

    def size(self) -> int | None:
        """Return the size of this object in bytes, or None if there is no such object.

        Raises
        ------
        StoreError
            The store does not answer.
        """
        import obstore

        try:
            return int(obstore.head(self.store, self.key)["size"])
        except FileNotFoundError:
            return None
        except (obstore.exceptions.BaseError, OSError) as error:
            raise StoreError(
                "the store does not answer", where=self, found=first_line(error), remedy=REMEDY
            ) from None

    def read_bytes(self, most: int = 1 << 62) -> bytes:
        """Read the whole object.

        Raises
        ------
        FileNotFoundError
            There is no such object.
        StoreError
            The store does not answer.
        CorruptError
            The object has more than `most` bytes.
        """
        result = self._get()
        size = int(result.meta["size"])
        # Before a byte is fetched: the store may declare any size.
        if size > most:
            raise CorruptError(
                "an object is too large", where=self, expected=f"at most {most} bytes", found=size
            )
        data = bytearray(size)
        self._receive(result, memoryview(data))
        return bytes(data)

    def read_into(self, memory: memoryview) -> None:
        """Read the whole object into `memory`, whose length is the published size.

        Raises
        ------
        StoreError
            The store does not answer.
        CorruptError
            The object is missing or has another size.
        """
        try:
            self._receive(self._get(), memory)
        except FileNotFoundError:
            raise CorruptError("a data file is missing", where=self, remedy=REMEDY) from None

    def _get(self) -> Any:
        import obstore

        try:
            return obstore.get(self.store, self.key)
        except FileNotFoundError:
            # With our own text: obstore's runs over many lines.
            raise FileNotFoundError(str(self)) from None
        except (obstore.exceptions.BaseError, OSError) as error:
            raise StoreError(
                "the store does not answer", where=self, found=first_line(error), remedy=REMEDY
            ) from None

    def _receive(self, result: Any, memory: memoryview) -> None:
        import obstore

        at, size = 0, int(result.meta["size"])
        if size == len(memory):
            # In parts: `result.bytes()` would hold a second copy of the whole object.
            try:
                for part in result.stream(min_chunk_size=STREAM_BYTES):
                    memory[at : at + len(part)] = part
                    at += len(part)
            except (obstore.exceptions.BaseError, OSError, ValueError) as error:
                raise StoreError(
                    "an object did not arrive completely",
                    where=self,
                    found=first_line(error),
                    remedy=REMEDY,
                ) from None
        if size != len(memory) or at != size:
            raise CorruptError(
                "a data file has the wrong size",
                where=self,
                expected=f"{len(memory)} bytes",
                found=min(at or size, size),
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # obstore's own refusal is a TypeError without a remedy. Told by its name, since obstore
        # need not be installed.
        if type(self.own_store).__name__ == "MemoryStore":
            raise ConfigError(
                "other processes cannot read a MemoryStore",
                where=self,
                remedy="use engine='thread'",
            )
        return Remote, (self.url, self.own_store, self.key)

    def __str__(self) -> str:
        if self.url is None:
            base = repr(self.own_store)
        else:
            # Neither a password nor the token of a signed query belongs into a message or a log.
            base = re.sub(r"//[^/@]*@", "//", self.url.split("?", 1)[0])
        return f"{base.rstrip('/')}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"Remote({self})"


Location = Path | Remote
"""Where a version, or a file of one, lies."""


def location_of(path: object) -> Location:
    """Return the location that a path, a URL or an obstore store stands for.

    Raises
    ------
    ConfigError
        `path` is something else.
    """
    if isinstance(path, (Path, Remote)):
        return path
    if isinstance(path, str):
        # Through obstore, a local version would be copied into memory instead of mapped.
        if path.lower().startswith("file://"):
            return Path(url2pathname(urlsplit(path).path))
        return Remote(path) if URL.match(path) else Path(path)
    if type(path).__module__.startswith("obstore"):
        return Remote(store=path)

    raise ConfigError("a warehouse is opened by path, URL or obstore store", found=repr(path)[:80])


def zarr_store(location: Location) -> tuple[Any, str]:
    """Return what zarr-python opens, and the prefix of the version's keys there.

    That is the folder itself without a prefix, or an object store.
    """
    if not isinstance(location, Remote):
        return location, ""
    from zarr.storage import ObjectStore

    return ObjectStore(location.store, read_only=True), f"{location.key}/"


def first_line(error: BaseException) -> str:
    """Return what an error says, cut to 160 characters of its first line."""
    # obstore appends its own Rust structures, over many lines.
    return str(error).split("\n", 1)[0][:160]
