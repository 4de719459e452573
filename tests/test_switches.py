"""Variables of the environment that are switches: one rule, whoever asks."""

from __future__ import annotations

import ctypes

import pytest

from mf_kernels.environment import switch
from mobileformer.training import memory


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", " On "])
def test_a_switch_is_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MF_KERNELS_STRICT", value)
    assert switch("MF_KERNELS_STRICT")


@pytest.mark.parametrize("value", ["", "0", "False", "no", "OFF"])
def test_a_switch_is_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MF_KERNELS_STRICT", value)
    assert not switch("MF_KERNELS_STRICT")
    monkeypatch.delenv("MF_KERNELS_STRICT")
    assert not switch("MF_KERNELS_STRICT")


def test_another_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MF_KERNELS_STRICT", "maybe")
    with pytest.raises(ValueError, match=r"^MF_KERNELS_STRICT: expected .*, got 'maybe'$"):
        switch("MF_KERNELS_STRICT")


def test_free_memory_is_nobodys_business_where_a_process_has_no_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where ctypes.CDLL(None) is a TypeError."""

    def none(name: str | None) -> None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(ctypes, "CDLL", none)
    monkeypatch.setattr(memory.os, "name", "nt")
    assert memory._find_trim() is None
