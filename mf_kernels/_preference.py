"""The operators that a call is routed for, which kernel `auto` takes of each, and the measurement that says so.

On CUDA, Triton comes first until a committed result of a real card shows that the CUDA C++ kernel of an
operator is right and faster. Such a change names its file under `benchmarks/results/`; the benchmark report
prints this table anew.
"""

from __future__ import annotations

from typing import NamedTuple

from mf_kernels import reference

# Those with an equation there, in its order
OPS = tuple(name for name in vars(reference) if name in reference.__all__)


class Preference(NamedTuple):
    """Backends in the order in which they are tried, and the file that justifies the order."""

    backends: tuple[str, ...]
    justified_by: str | None  # None: no committed result from a card yet


CUDA = {
    "mobile_to_former": Preference(("triton", "native"), None),
    "former_to_mobile": Preference(("triton", "native"), None),
    "dynamic_relu": Preference(("triton", "native"), None),
    "spatial_dynamic_relu": Preference(("triton", "native"), None),
    "depthwise_conv2d": Preference(("triton", "native"), None),
}
UNMEASURED = Preference(("triton", "native"), None)  # of an operator that the table does not name yet
DEVICES = ("cpu", "cuda")


def backends(op: str, device: str) -> tuple[str, ...]:
    """What `auto` tries, in order, before the reference; nothing on a device without kernels."""
    if device == "cuda":
        return CUDA.get(op, UNMEASURED).backends
    return ("native",) if device == "cpu" else ()
