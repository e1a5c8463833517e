"""Public keys that sign repositories, in the armored form that apt and rpm both read (RFC 4880, section 6).

A file may hold several blocks one after another, as vendors write them while they change their key.
"""

from __future__ import annotations

import base64
import re
import textwrap

HEAD, TAIL = "-----BEGIN PGP PUBLIC KEY BLOCK-----", "-----END PGP PUBLIC KEY BLOCK-----"
_BLOCK = re.compile(f"{HEAD}\n.*?{TAIL}", re.DOTALL)


class BadKey(ValueError):
    """What was given is no public key."""


def armored(data: bytes) -> str:
    """All key blocks, from armored keys or from a binary one (as ``gpg --export`` writes it).

    Raises BadKey for anything else, above all for a secret key.
    """
    if b"PRIVATE KEY BLOCK" in data:
        raise BadKey("this is a secret key, which must not leave its owner")
    if HEAD.encode() in data:
        blocks = _BLOCK.findall(data.decode("ascii", "replace").replace("\r\n", "\n"))
        if len(blocks) != data.count(HEAD.encode()):
            raise BadKey("a PGP public key block in it has no end")
        return "".join(f"{block}\n" for block in blocks)
    # The first byte of a packet: bit 7, then the old form with the tag in bits 2-5, or the new with 0-5.
    first = data[0] if data else 0
    tag = (first & 0x3F if first & 0x40 else (first & 0x3C) >> 2) if first & 0x80 else 0
    if tag == 5:
        raise BadKey("this is a secret key, which must not leave its owner")
    if tag != 6:
        raise BadKey("neither an armored nor a binary PGP public key")
    body = textwrap.fill(base64.b64encode(data).decode(), 64)
    check = base64.b64encode(_crc24(data).to_bytes(3, "big")).decode()
    return f"{HEAD}\n\n{body}\n={check}\n{TAIL}\n"


def _crc24(data: bytes) -> int:
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc & 0xFFFFFF
