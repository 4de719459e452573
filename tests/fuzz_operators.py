"""Calls of every operator at the dispatcher with arguments of wrong shape, dtype, layout or value, and some right ones.

    python tests/fuzz_operators.py [calls] [seed]

A tensor ends, or begins, at a page that cannot be read. Each call is printed before it is made, so that the last line
names the one that the process died of. Prints the numbers of served and refused calls at the end.
"""

from __future__ import annotations

import faulthandler
import random
import sys
from collections.abc import Callable
from typing import Any

import memory_support
import torch
from torch import Tensor

import mf_kernels  # noqa: F401 declares the operators
from mf_kernels import _native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.bool, torch.complex64)
SIDES = (0, 1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 2**31, 2**40)
WHOLE = (0, -1, -2, 1, 2, 3, 4, 5, 8, 2**31, 2**62, 2**63 - 1, -(2**63))
REAL = (0.0, -1.0, 1e-5, 1e300, float("nan"), float("inf"))
TEXT = ("", "relu", "identity", "relu6", "hardswish", "dynamic_relu", "x" * 10_000)


def guarded(rng: random.Random, t: Tensor) -> Tensor:
    """The same tensor in memory whose neighbouring pages fault; anything that is not dense stays where it is."""
    used = t.numel() * t.element_size()
    if used == 0 or not (t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))):
        return t
    if t.dtype == torch.bool:
        return t
    memory, offset = memory_support.guarded(used, at_end=rng.random() < 0.7)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def operators(rng: random.Random) -> list[tuple[str, Callable[[], list[Any]]]]:
    """(name, right arguments) of all of them."""
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    exact = rng.choice((torch.float32, torch.float64))
    batch, heads, tokens, height, width = (
        rng.choice(sides) for sides in ((1, 2, 3), (1, 2), (1, 6, 8), (3, 9), (4, 11))
    )
    channels, stride, kernel, mult = heads * rng.choice((1, 5, 16)), rng.choice((1, 2)), rng.choice((3, 5)), 2

    def random_(*shape: int, of: torch.dtype = dtype) -> Tensor:
        t = torch.randn(shape).to(of)
        return t.to(memory_format=torch.channels_last) if len(shape) == 4 and rng.random() < 0.5 else t

    def x(of: torch.dtype = dtype) -> Tensor:
        return random_(batch, channels, height, width, of=of)

    def token() -> Tensor:
        return random_(batch, tokens, channels)

    def spatial() -> list[Tensor]:
        return [random_(batch, tokens, 2 * channels), random_(batch, tokens, height, width)]

    def depthwise() -> list[Any]:
        outputs = channels * mult
        return [x(), random_(outputs, 1, kernel, kernel), rng.choice((None, random_(outputs)))]

    def gradient() -> Tensor:
        return random_(batch, channels * mult, -(-height // stride), -(-width // stride))

    def norm(count: int) -> list[Tensor]:
        return [random_(channels, of=exact).abs() for _ in range(count)]

    def statistics() -> Tensor:
        return random_(batch, heads, tokens, 2, of=torch.float64 if dtype == torch.float64 else torch.float32)

    def side() -> list[Any]:
        D, f = 32, torch.float32
        shapes = [
            (channels, D),
            (D, channels),
            (D,),
            (D, D),
            (D, D),
            (D,),
            (2 * D, D),
            (D, 2 * D),
            (D,),
            (5, D),
            (5, D),
        ]
        shapes += [(D // 4, D), (6, D // 4)] * rng.choice((0, 1, 2))
        parameters = [t for s in shapes for t in (random_(*s, of=f), random_(s[0], of=f))]
        return [random_(batch, tokens, D, of=f), random_(batch, tokens, channels, of=f), parameters, 2, 1e-5]

    theta, wide = (batch, 2 * channels), (batch, 2 * channels * mult)
    named = rng.choice(("identity", "relu6", "hardswish"))
    joined = rng.choice(("identity", "relu6", "dynamic_relu"))
    slopes = random_(*theta, of=exact) if joined == "dynamic_relu" else None
    return [
        ("dynamic_relu_fwd", lambda: [x(), random_(*theta)]),
        ("dynamic_relu_", lambda: [x(), random_(*theta)]),
        ("dynamic_relu_bwd", lambda: [x(), x(), random_(*theta)]),
        ("mobile_to_former_fwd", lambda: [x(), token(), heads]),
        ("mobile_to_former_bwd", lambda: [token(), x(), token(), token(), statistics(), heads]),
        ("former_to_mobile_fwd", lambda: [x(), token(), token(), heads]),
        ("former_to_mobile_", lambda: [x(), token(), token(), heads]),
        ("former_to_mobile_bwd", lambda: [x(), x(), token(), token(), heads]),
        ("spatial_dynamic_relu_fwd", lambda: [x(), *spatial()]),
        ("spatial_dynamic_relu_", lambda: [x(), *spatial()]),
        ("spatial_dynamic_relu_bwd", lambda: [x(), x(), *spatial()]),
        ("depthwise_conv2d_fwd", lambda: [*depthwise(), stride, named]),
        ("depthwise_conv2d_bwd", lambda: [gradient(), *depthwise(), stride, named]),
        ("depthwise_dynamic_relu", lambda: [*depthwise(), random_(*wide), stride]),
        ("fold_batch_norm", lambda: [random_(channels, 3, kernel, kernel, of=exact), *norm(4), 1e-5]),
        ("batch_norm_activation_fwd", lambda: [x(exact), *norm(2), slopes, *norm(2), 0.1, 1e-5, joined]),
        ("batch_norm_activation_bwd", lambda: [x(exact), x(exact), *norm(2), slopes, *norm(2), joined]),
        ("token_side", side),
    ]


def filled(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Ones; where they would not fit, one element that all share."""
    elements = 1
    for side in shape:
        elements *= side
    if elements < 1 << 22:
        return torch.ones(shape, dtype=dtype)
    return torch.ones((), dtype=dtype).expand(shape) if elements < 1 << 62 else torch.ones(1, dtype=dtype)


def whole_in_memory(t: Tensor) -> bool:
    return t.untyped_storage().size() >= t.numel() * t.element_size()


def changed_tensor(rng: random.Random, t: Tensor, others: list[Tensor]) -> Tensor:
    if not whole_in_memory(t):
        return t
    shape = list(t.shape)
    kind = rng.randrange(9)
    if kind == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice(SIDES)
        return filled(shape, t.dtype)
    if kind == 1 and shape:
        at = rng.randrange(len(shape))
        shape[at] = max(0, shape[at] + rng.choice((-1, 1)))
        return filled(shape, t.dtype)
    if kind == 2:
        return t.unsqueeze(rng.randrange(t.dim() + 1)) if rng.random() < 0.5 or not shape else t[0] if shape[0] else t
    if kind == 3:
        return t.to(rng.choice(DTYPES))
    if kind == 4 and t.dim() > 1:
        return t.transpose(*rng.sample(range(t.dim()), 2))
    if kind == 5 and t.numel():
        return t[..., :1].expand(t.shape) if shape else t
    if kind == 6:
        return t.repeat_interleave(2, -1)[..., ::2] if shape else t
    if kind == 7 and t.numel() > 1:  # its storage becomes shorter than it
        t = t.clone()
        t.untyped_storage().resize_(rng.choice((0, t.element_size())))
        return t
    other = rng.choice([o for o in others if whole_in_memory(o)] or [t])  # in the memory of another argument
    return other.reshape(-1)[: t.numel()].view(t.shape) if other.numel() >= t.numel() else other


def changed(rng: random.Random, arguments: list[Any]) -> None:
    at = rng.randrange(len(arguments))
    value = arguments[at]
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if isinstance(value, list):
        kind = rng.randrange(4)
        if kind == 0:
            del value[rng.randrange(len(value)) :]
        elif kind == 1:
            value.append(torch.ones(3))
        else:
            place = rng.randrange(len(value))
            value[place] = changed_tensor(rng, value[place], tensors)
    elif isinstance(value, Tensor):
        arguments[at] = None if rng.random() < 0.05 else changed_tensor(rng, value, tensors)
    elif isinstance(value, str):
        arguments[at] = rng.choice(TEXT)
    elif isinstance(value, float):
        arguments[at] = rng.choice(REAL)
    elif value is None:
        arguments[at] = torch.ones(rng.choice(SIDES[:-2]))
    else:
        arguments[at] = rng.choice(WHOLE)


def told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}/{value.stride()}"
    return f"[{', '.join(map(told, value))}]" if isinstance(value, list) else f"{value!r:.40}"


def main(calls: int, seed: int) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    assert _native.load("cpu") is None
    rng = random.Random(seed)
    torch.manual_seed(seed)
    served = refused = 0
    for number in range(calls):
        rows = operators(rng)
        name, right = rows[number % len(rows)]
        arguments = right()
        arguments = [
            guarded(rng, a) if isinstance(a, Tensor) else [guarded(rng, t) for t in a] if isinstance(a, list) else a
            for a in arguments
        ]
        wrong = rng.choice((0, 1, 1, 1, 2))
        for _ in range(wrong):
            changed(rng, arguments)
        for at, argument in enumerate(arguments):  # what was changed lies at a guard as well
            if wrong and isinstance(argument, Tensor) and whole_in_memory(argument) and argument.numel() < 1 << 22:
                arguments[at] = guarded(rng, argument) if rng.random() < 0.8 else argument
        print(f"{number}: {name}({', '.join(map(told, arguments))})", flush=True)
        try:
            getattr(torch.ops.mf_kernels, name).native(*arguments)
            served += 1
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if not wrong:
                raise
            refused += 1
            text = str(error)
            if text.startswith(name.removesuffix("_fwd")):
                assert "\n" not in text, text
                assert ": expected " in text, text
    print(f"served {served} refused {refused}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
