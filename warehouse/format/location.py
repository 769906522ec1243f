"""A published version in an object store or behind HTTP: as much of `pathlib.Path` as reading a
version takes, through obstore.

Objects are fetched whole, and nothing is trusted for having arrived: sizes are compared here,
digests and seals by who asked. A `Remote` made from a URL pickles as that URL; credentials come
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

__all__ = ["Location", "Remote", "location_of"]

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
TIMEOUT_S = 300
"""Of one object.

A stored chunk is fetched whole, and obstore's 30 s are too few for 128 MiB on a slow line.
"""
PIECE_BYTES = 4 << 20
REMEDY = "is the address right and the network up? the version may be copied to a local disk and opened there"


class Remote:
    """An object, or the prefix of several.

    `/` goes below, `str` is what errors show (user and password of a URL left out).
    """

    def __init__(self, url: str | None = None, store: Any = None, key: str = "") -> None:
        """url: of the prefix everything lies below; store: an obstore store instead of it; key.

        Below either.
        """
        assert (url is None) != (store is None)
        self.url, self.given, self.key = url, store, key
        self._opened: Any = store

    @property
    def store(self) -> Any:
        """The obstore store, opened when first needed.

        Raises StoreError for a URL it does not know, or when obstore is not installed.
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
        found = Remote(self.url, self.given, key)
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
        """The whole object.

        Raises FileNotFoundError, StoreError when the store does not answer, CorruptError beyond
        `most` bytes.
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
        """The whole object into `memory`, whose length is the published size.

        Raises CorruptError when it is missing or of another size.
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
                for piece in result.stream(min_chunk_size=PIECE_BYTES):
                    memory[at : at + len(piece)] = piece
                    at += len(piece)
            except (obstore.exceptions.BaseError, OSError, ValueError) as error:
                raise StoreError(
                    "an object did not arrive whole",
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
        if type(self.given).__name__ == "MemoryStore":
            raise ConfigError(
                "a MemoryStore cannot be read by other processes",
                where=self,
                remedy="use engine='thread'",
            )
        return Remote, (self.url, self.given, self.key)

    def __str__(self) -> str:
        base = (
            repr(self.given)
            if self.url is None
            else re.sub(r"//[^/@]*@", "//", self.url.split("?", 1)[0])
        )
        return f"{base.rstrip('/')}/{self.key}".rstrip("/")

    def __repr__(self) -> str:
        return f"Remote({self})"


Location = Path | Remote
"""Where a version, or a file of one, lies."""


def location_of(path: Any) -> Location:
    """A path, a file:// URL (a path too), any other URL, or an obstore store.

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


def first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:160]
