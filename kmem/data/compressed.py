"""Zstandard files as streams that detect truncation."""

import io
from pathlib import Path
from typing import Any, BinaryIO, cast


class CompressedFileError(Exception):
    """The compressed data is damaged or ends inside a frame."""


def open_zstandard(path: Path) -> BinaryIO:
    """Open the content of a .zst file for reading; reading raises CompressedFileError where the data is damaged.

    zstandard's own stream_reader (0.25) returns the content of a truncated frame and then ends without an error.
    """
    return cast(BinaryIO, io.BufferedReader(_ZstandardFile(path), buffer_size=1 << 20))


class _ZstandardFile(io.RawIOBase):
    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._frame: Any = None  # a zstandard decompression object; it knows when its frame is complete
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            if not self._refill():
                return 0
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _refill(self) -> bool:
        """Decompress the next piece of the file; False at the end of the file."""
        import zstandard

        compressed = b""
        if self._frame is not None and self._frame.eof:  # frames may follow one another
            compressed, self._frame = self._frame.unused_data, None
        compressed = compressed or self._file.read(1 << 17)
        if not compressed:
            if self._frame is not None:
                raise CompressedFileError("the file ends inside a frame")
            return False
        try:
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._pending = memoryview(self._frame.decompress(compressed))
        except zstandard.ZstdError as error:
            raise CompressedFileError(str(error)) from None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
