"""Distinguished names as GnuTLS, and so QEMU's authz objects, write them (RFC 4514)."""

from __future__ import annotations

import re
from collections.abc import Iterable

Subject = Iterable[Iterable[tuple[str, str]]]
"""As ssl's getpeercert() has it: relative names, in the certificate's order."""

_SHORT = {
    "commonName": "CN", "countryName": "C", "localityName": "L", "stateOrProvinceName": "ST",
    "organizationName": "O", "organizationalUnitName": "OU", "streetAddress": "STREET",
    "domainComponent": "DC", "userId": "UID", "emailAddress": "EMAIL", "surname": "surName",
}  # fmt: skip
_SPECIAL = re.compile(r'([,+"\\<>;])')


def distinguished_name(subject: Subject) -> str:
    """The last part of the certificate's order comes first: CN=host,O=Example,C=GB."""
    return ",".join("+".join(map(_pair, names)) for names in reversed(list(subject)))


def _pair(name: tuple[str, str]) -> str:
    kind, value = name
    value = _SPECIAL.sub(r"\\\1", value)
    if value.startswith(("#", " ")):
        value = "\\" + value
    if value.endswith(" "):
        value = value[:-1] + "\\ "
    return f"{_SHORT.get(kind, kind)}={value}"
