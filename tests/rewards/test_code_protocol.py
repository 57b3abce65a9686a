"""The protocol between tester and solution: faithful to plain values, deaf to everything else."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from rewards.code.protocol import (
    MAX_FRAME_BYTES,
    BadValue,
    Channel,
    Closed,
    Decoder,
    Encoder,
    NoPlainForm,
    dumps,
    loads,
)


class Node:
    def __init__(self, value: Any, next: Any = None) -> None:
        self.value = value
        self.next = next


def refuse(value: Any) -> list[Any]:
    raise NoPlainForm(type(value).__name__)


def unknown(tag: str, number: Any) -> Any:
    raise BadValue(f"unknown tag {tag}")


def crossed(value: Any) -> Any:
    encoder = Encoder(refuse, lambda kind: kind is Node)
    encoded = loads(dumps(encoder.encode(value)))
    objects = loads(dumps(encoder.objects))
    return Decoder(unknown, {"Node": Node}).decode_message([encoded], objects)[0]


def decode(text: str, objects: Any = ()) -> Any:
    return Decoder(unknown, {"Node": Node}).decode_message([loads(text)], list(objects))[0]


def test_subclasses_cross_as_the_plain_value_underneath() -> None:
    class Five(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __repr__(self) -> str:
            return "5"

        __hash__ = int.__hash__

    class Anything(list[int]):
        def __eq__(self, other: object) -> bool:
            return True

        def __iter__(self) -> Any:
            return iter([1, 2, 3])

    value = crossed([Five(0), Anything(), type("F", (float,), {"__sub__": lambda a, b: 0.0})(9.0)])
    assert [type(part) for part in value] == [int, list, float]
    assert value == [0, [], 9.0]


def test_chains_and_cycles_of_shared_objects_cross_without_recursion() -> None:
    chain = None
    for value in range(20_000):
        chain = Node(value, chain)
    node, length = crossed(chain), 0
    while node is not None:
        node, length = node.next, length + 1
    assert length == 20_000
    ring = Node(1)
    ring.next = ring
    copy = crossed(ring)
    assert type(copy) is Node and copy.next is copy


def test_a_value_within_itself_and_one_nested_too_deep_are_refused() -> None:
    inner: list[Any] = []
    inner.append(inner)
    with pytest.raises(BadValue, match="a part of itself"):
        crossed(inner)
    with pytest.raises(NoPlainForm, match="object"):
        crossed([object()])


@pytest.mark.parametrize(
    "text",
    [
        '{"list": []}',
        "[]",
        "[[]]",
        '["list"]',
        '["list", 5]',
        '["list", "ab"]',
        '["dict", [1]]',
        '["dict", [["list", []], 1]]',
        '["set", [["list", []]]]',
        '["int", "0x"]',
        '["int", 5]',
        '["int", "1_0"]',
        '["bytes", ["zz"]]',
        '["bytes", "00"]',
        '["complex", ["1", 2]]',
        '["range", [1, 2, 0]]',
        '["range", [1.5, 2, 1]]',
        '["range", 1, 2, 1]',
        '["fraction", [1, 0]]',
        '["fraction", ["1e99999999"]]',
        '["decimal", [5]]',
        '["counter", [1]]',
        '["named", [1, 2], "P", "x"]',
        '["named", [1], "P", "x y"]',
        '["named", [1], "P", "__class__"]',
        '["text", [5, 0]]',
        '["object", 0]',
        '["object", -1]',
        '["eval", "1"]',
        '["handle", "x"]',
        "[" * 5000 + "]" * 5000,
        "1" * 5000,
    ],
)
def test_anything_that_an_encoder_would_not_send_is_refused(text: str) -> None:
    with pytest.raises((BadValue, ValueError, RecursionError)):
        decode(text)


def test_only_classes_of_the_receiver_are_made_and_no_special_attribute_is_set() -> None:
    assert decode('["object", 0]', [["Node", ["dict", ["value", 1]][1]]]).value == 1
    for objects in ([["os", []]], [["Node", ["__class__", 1]]], [["Node", [1, 2]]], [["Node"]], [[]]):
        with pytest.raises(BadValue):
            decode('["object", 0]', objects)


def channel_with(data: bytes) -> Channel:
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    return Channel(read_end, -1)


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", Closed),
        (b"\x05\x00\x00\x00[1", Closed),
        (frame(b"[1]") + b"x", BadValue),
        (frame(b"nonsense"), BadValue),
        (frame(b"\xff\xfe"), BadValue),
        (frame(b'{"a": 1}'), BadValue),
        ((MAX_FRAME_BYTES + 1).to_bytes(4, "little") + b"[", BadValue),
    ],
)
def test_a_frame_is_whole_capped_and_json(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        channel_with(data).receive()


def test_frames_above_the_pipe_size_arrive_whole() -> None:
    here, there = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            Channel(here[0], there[1]).send([Channel(here[0], there[1]).receive(), "back"])
        finally:
            os._exit(0)
    channel = Channel(there[0], here[1])
    channel.send("x" * 1_000_000)
    assert channel.receive() == ["x" * 1_000_000, "back"]
    os.wait()
    with pytest.raises(BadValue, match="above the cap"):
        channel.send("x" * MAX_FRAME_BYTES)
    assert json.loads(dumps("ü")) == "ü"
