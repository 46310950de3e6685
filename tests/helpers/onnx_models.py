"""Tiny ONNX models, written without the onnx package: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto."""

from collections.abc import Sequence
from pathlib import Path


def mean_model(path: Path, axes: Sequence[int] = (1, 2, 3), size: int = 32) -> Path:
    """Write a model that takes pictures [N, 3, size, size] and returns their means over axes."""
    axes_attribute = _field(1, b"axes") + b"".join(_field(8, axis) for axis in axes) + _field(20, 7)
    keep_attribute = _field(1, b"keepdims") + _field(3, 0) + _field(20, 2)
    node = _field(1, b"pictures") + _field(2, b"means") + _field(4, b"ReduceMean")
    node += _field(5, axes_attribute) + _field(5, keep_attribute)
    rest = [side for axis, side in enumerate((None, 3, size, size)) if axis not in axes]
    graph = _field(1, node) + _field(2, b"g") + _field(11, _tensor(b"pictures", (None, 3, size, size)))
    graph += _field(12, _tensor(b"means", rest))
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, 13)))
    return path


def _tensor(name: bytes, shape: Sequence[int | None]) -> bytes:
    sides = b"".join(_field(1, _field(1, side) if side else _field(2, b"N")) for side in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, sides)))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes(parts + bytes([value]))
