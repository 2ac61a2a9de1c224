"""The table of number formats against torch and the C header."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from plugins.common.formats import Format, format_of
from plugins.libtwofour import bindings, structures

HEADER = Path(bindings.__file__).parents[1] / "csrc" / "include" / "twofour.h"


@pytest.mark.parametrize("format", list(Format))
def test_a_format_is_torchs(format: Format) -> None:
    assert getattr(torch, format.dtype).itemsize == format.nbytes
    assert format_of(format.value) is format
    assert f"{format}" == format.value


def test_the_types_are_numbered_as_in_the_c_header() -> None:
    enumerated = re.findall(r"TWOFOUR_(FP16|BF16|INT8|FP8)\s*=\s*(\d)", HEADER.read_text())
    assert {name.lower(): int(number) for name, number in enumerated} == {
        name: number for number, name in enumerate(structures.FORMATS)
    }
