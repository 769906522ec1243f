"""Where a version lies: a folder, or a prefix of an object store or web server.

`Remote` offers as much of `pathlib.Path` as reading a version takes, through obstore. Objects are
fetched whole, and nothing is trusted for having arrived: sizes are compared here, digests and seals
by the caller. A `Remote` made from a URL pickles as that URL; credentials come
from the environment of each process, as obstore documents them (AWS_*, GOOGLE_*, AZURE_*). One made
from an obstore store pickles with it. Given up: writing, listing, reading byte ranges. URLs:
https://developmentseed.org/obstore/latest/getting-started/
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

    `/` leads below it, as for a path; `str` is what errors show, without the user name and
    password of a URL.

    Parameters
    ----------
    url
        URL of the prefix that everything lies below.
    store
        An obstore store instead of a URL.
    key
        Name of the object or prefix below either.
    """

    def __init__(self, url: str | None = None, store: Any = None, key: str = "") -> None:
        assert (url is None) != (store is None)
        self.url, self.own_store, self.key = url, store, key
        self._opened: Any = store

    @property
    def store(self) -> Any:
        """The obstore store, opened when first needed.

        Raises StoreError for a URL that obstore does not know, or when it is not installed.
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
        return PurePosixPath(self.key or urlsplit(self.url or "").path).name

    @property
    def parent(self) -> Remote:
        if self.key:
            above = PurePosixPath(self.key).parent.as_posix()
            return self._at("" if above == "." else above)
        assert self.url is not None
        return Remote(self.url.rstrip("/").rsplit("/", 1)[0])

    def __truediv__(self, below: str | PurePath) -> Remote:
        return self._at((PurePosixPath(self.key) / PurePath(below).as_posix()).as_posix())

    def _at(self, key: str) -> Remote:
        found = Remote(self.url, self.own_store, key)
        found._opened = self._opened
        return found

    def size(self) -> int | None:
        """Bytes of this object, None where there is none.

        Raises StoreError when the store does not answer.
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
        if size > most:
            raise CorruptError(
                "an object is too large", where=self, expected=f"at most {most} bytes", found=size
            )
        data = bytearray(size)
        self._receive(result, memoryview(data))
        return bytes(data)

    def read_into(self, memory: memoryview) -> None:
        """Read the whole object into `memory`, whose length is the published size.

        Raises CorruptError when the object is missing or of another size.
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
            raise FileNotFoundError(str(self)) from None
        except (obstore.exceptions.BaseError, OSError) as error:
            raise StoreError(
                "the store does not answer", where=self, found=first_line(error), remedy=REMEDY
            ) from None

    def _receive(self, result: Any, memory: memoryview) -> None:
        import obstore

        at, size = 0, int(result.meta["size"])
        if size == len(memory):
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
        if type(self.own_store).__name__ == "MemoryStore":
            raise ConfigError(
                "a MemoryStore cannot be read by other processes",
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


def location_of(path: Any) -> Location:
    """Turn a path, a URL or an obstore store into a location. A file:// URL becomes a path.

    Raises ConfigError for anything else.
    """
    if isinstance(path, (Path, Remote)):
        return path
    if isinstance(path, str):
        if path.lower().startswith("file://"):
            return Path(url2pathname(urlsplit(path).path))
        return Remote(path) if URL.match(path) else Path(path)
    if type(path).__module__.startswith("obstore"):
        return Remote(store=path)
    raise ConfigError("a warehouse is opened by path, URL or obstore store", found=repr(path)[:80])


def zarr_store(location: Location) -> tuple[Any, str]:
    """What zarr opens, and the prefix of its keys there.

    That is the folder itself, or zarr's view of an object store.
    """
    if not isinstance(location, Remote):
        return location, ""
    from zarr.storage import ObjectStore

    return ObjectStore(location.store, read_only=True), f"{location.key}/"


def first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:160]
