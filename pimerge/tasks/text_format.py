"""How the cells of a text file are written: delimiter, encoding and quoting."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Mapping
from dataclasses import dataclass

from pimerge.core.errors import Problems, nearest

OPTIONS = ("delimiter", "encoding", "quoting")
"""Keys of ``data`` that are not splits."""
_QUOTING = {"none": csv.QUOTE_NONE, "minimal": csv.QUOTE_MINIMAL, "all": csv.QUOTE_ALL}


@dataclass(frozen=True)
class TextFormat:
    """How text files are written; None means what is usual for the file's ending.

    Attributes:
        delimiter: the character between cells; by default a tab in ``.tsv``, otherwise a comma.
        encoding: name of the encoding; by default UTF-8, or UTF-16 if the file begins with its mark.
        quoting: ``minimal`` or ``all`` if quotes may enclose a cell, ``none`` if a quote is a character like any
            other; by default none in ``.tsv``.
    """

    delimiter: str | None = None
    encoding: str | None = None
    quoting: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, object], where: str) -> TextFormat:
        """Check the options; all problems are raised at once."""
        problems = Problems()
        found = {name: str(value) for name, value in options.items()}
        delimiter, quoting = found.get("delimiter"), found.get("quoting")
        if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
            problems.add(f"{where}: the delimiter is {delimiter!r}", "give one character, such as ';' or '\\t'")
        if quoting is not None and quoting not in _QUOTING:
            problems.add(f"{where}: quoting is '{quoting}'", nearest(quoting, list(_QUOTING)))
        if "encoding" in found and not _is_encoding(found["encoding"]):
            problems.add(f"{where}: there is no encoding '{found['encoding']}'", "such as 'utf-8', 'latin-1', 'cp1252'")
        problems.raise_any(f"the format of {where} does not fit")
        return cls(**found)

    def delimiter_of(self, ending: str) -> str:
        """The delimiter of a file with this ending."""
        return self.delimiter or ("\t" if ending == ".tsv" else ",")

    def quoting_of(self, ending: str) -> int:
        """The constant of :mod:`csv` for a file with this ending."""
        return _QUOTING[self.quoting or ("none" if ending == ".tsv" else "minimal")]


def _is_encoding(name: str) -> bool:
    try:
        return "" in ("".encode(name).decode(name), codecs.lookup(name).name)
    except (LookupError, ValueError):
        return False
