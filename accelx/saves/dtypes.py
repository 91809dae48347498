"""How each dtype is called, how wide it is, and what safetensors calls it."""

from __future__ import annotations

import attrs


@attrs.frozen
class Kind:
    """One dtype as it is stored."""

    width: int  # bytes an element
    code: str  # in a safetensors header
    codes: int = 1  # header elements an element takes


# torch's name without "torch.". What safetensors has no code for is stored as bytes or
# pairs: the manifest says what it is.
KINDS = {
    "bool": Kind(1, "BOOL"),
    "uint8": Kind(1, "U8"),
    "int8": Kind(1, "I8"),
    "uint16": Kind(2, "U16"),
    "int16": Kind(2, "I16"),
    "uint32": Kind(4, "U32"),
    "int32": Kind(4, "I32"),
    "uint64": Kind(8, "U64"),
    "int64": Kind(8, "I64"),
    "float16": Kind(2, "F16"),
    "bfloat16": Kind(2, "BF16"),
    "float32": Kind(4, "F32"),
    "float64": Kind(8, "F64"),
    "float8_e4m3fn": Kind(1, "F8_E4M3"),
    "float8_e5m2": Kind(1, "F8_E5M2"),
    "float8_e8m0fnu": Kind(1, "F8_E8M0"),
    "float8_e4m3fnuz": Kind(1, "U8"),
    "float8_e5m2fnuz": Kind(1, "U8"),
    "float4_e2m1fn_x2": Kind(1, "U8"),  # two numbers a byte
    "complex32": Kind(4, "F16", 2),
    "complex64": Kind(8, "C64"),
    "complex128": Kind(16, "F64", 2),
}
NAMES = {kind.code: name for name, kind in reversed(KINDS.items()) if kind.codes == 1}
NAMES["U8"] = "uint8"
