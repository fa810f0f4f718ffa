"""JSON values off a byte stream: the same however the bytes come, and never too deep to be used."""

from __future__ import annotations

import json

import pytest

from sharded_pc.transport.json_stream import MAX_DEPTH, MAX_VALUE_BYTES, JsonSplitter

VALUES = ({"a": 1.5}, [-2.5e3, {"b": [True, None]}], {"é\U0001f600": '\\" ] }'}, {}, [])


def take_all(pieces) -> list:
    splitter, out = JsonSplitter(), []
    for piece in pieces:
        splitter.feed(piece)
        while (value := splitter.take()) is not None:
            out.append(value)
    return out


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("between", ["", "\r\n", " \t"])
def test_cut_anywhere(between: str, ascii_only: bool) -> None:
    text = between.join(json.dumps(value, ensure_ascii=ascii_only) for value in VALUES).encode()
    assert take_all([text]) == list(VALUES)
    for at in range(1, len(text)):
        assert take_all([text[:at], text[at:]]) == list(VALUES), text[:at]


@pytest.mark.parametrize(
    "text",
    [b"rubbish", b"1", b'"word"', b"{]", b"]", b"[}", b"[1}", b"{a}", b'{"a":\xff}', b'{"a":NaN}',
     b"[-Infinity]", b"[1e999]", b"[1,]", b"[\\]", b'["\n"]', b"[" + b"9" * 5000 + b"]"],
)  # fmt: skip
def test_no_json(text: bytes) -> None:
    for pieces in ([text], [text[at : at + 1] for at in range(len(text))]):
        with pytest.raises(ValueError, match="not JSON"):
            take_all(pieces)


def test_as_deep_as_allowed() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert len(take_all([deep, deep])) == 2
    with pytest.raises(ValueError, match="nested too deeply"):
        take_all([b"[" * (MAX_DEPTH + 1)])


def test_as_long_as_allowed() -> None:
    longest = b'["' + b"x" * (MAX_VALUE_BYTES - 4) + b'"]'
    assert len(take_all([longest, longest])) == 2
    for too_long in (b" " + longest[:-1] + b"x", b'["' + longest[2:-2] + b'x"]'):
        with pytest.raises(ValueError, match="more than"):
            take_all([too_long + b"..."])
