"""Text from elsewhere, made fit for a terminal.

Names of RAMBlocks and machines come off the wire: any bytes.  A terminal would obey some of them,
and those that are not UTF-8 (surrogates here, PEP 383) cannot even be printed.
"""

from __future__ import annotations

import logging


def printable(text: str, keep: str = "") -> str:
    """`text` with everything escaped that a terminal does not show as it is; `keep`: not these."""
    return "".join(c if c in keep or c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


class PrintableFormatter(logging.Formatter):
    """Log lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")
