"""What `Model.to_inference` returns: the CPU engine where it can serve a call, PyTorch where it cannot."""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import nullcontext
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from mf_kernels import KernelFallbackWarning
from mf_kernels.environment import is_transformed, switch
from mobileformer.files.metadata import describe
from mobileformer.inference import library
from mobileformer.inference.engine import Engine, NotFiniteError
from mobileformer.inference.folded import FoldedNetwork
from mobileformer.inference.folding import arrays_of, folded_copy, hooked_part, parts_of_its_own
from mobileformer.inference.threads import check_threads, most_threads, thread_count
from mobileformer.network.classifier import Classifier
from mobileformer.network.convolution import ConvNorm
from mobileformer.network.parts import watched_globally

__all__ = ["DTYPES", "InferenceModel"]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_MADE_ANEW = (
    *("_engines", "_lock", "_hooks", "_tokens", "_values", "_versions"),
    *("_handed_out", "_inside", "_owns", "_settled", "_state"),
)
_SETTINGS = (("eps",), ("shuffle", "stride", "groups", "activation"))
_version = attrgetter("_version")
_warned: set[str] = set()


class InferenceModel(nn.Module):
    """What `Model.to_inference` returns: called like the model, same logits; neither trained nor saved.

    `network` is the folded model in PyTorch. It serves where the engine does not, which `Model.to_inference` lists, and
    alone once the copy has been moved to a GPU or another dtype. `engine` tells which of them it is.
    """

    def __init__(self, model: Classifier, *, dtype: torch.dtype, threads: int | None) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if threads is not None:
            check_threads(threads, ", or None")
        self.threads = threads
        self._dtype = dtype
        with torch.inference_mode(False):  # whoever calls this inside: its tensors have no version to watch
            network = folded_copy(model)
            self._folded = _folded(model, network, dtype)
            self.network = network.to(dtype)
        super().train(False)
        self._prepare()

    def forward(self, x: Tensor) -> Tensor:
        """x (B,in_chans,H,W) of any floating dtype -> logits (B,num_classes) of the same dtype."""
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
        # First, so that a compiler sees PyTorch and nothing else.
        if not torch.compiler.is_compiling() and _wants_numbers_only(x):
            engine = self.engine
            if engine is not None:
                try:
                    logits = engine(x.to(torch.float32).numpy(force=True))
                except NotFiniteError:
                    pass  # PyTorch carries those through to the end
                else:
                    return torch.from_numpy(logits).to(x.dtype)
        threads = nullcontext() if self.threads is None else thread_count(self.threads)
        # Nothing here needs a gradient but the input may, for a saliency map say; the fastest operators come
        # without.
        gradient = nullcontext() if x.requires_grad else torch.no_grad()
        with threads, gradient:
            return cast(Classifier, self._modules["network"])(x.to(self._tokens.dtype)).to(x.dtype)

    @property
    def engine(self) -> Engine | None:
        """The engine that serves a tensor on the CPU, or None where PyTorch does. Packed on first use."""
        tokens = self._tokens
        if self._folded is None or tokens.dtype != self._dtype or not tokens.is_cpu or any(self._hooks):
            return None
        if self._written():
            _fall_back("parameters of the copy were written to, and the engine has those of before")
            return None
        if self._altered():
            _fall_back("a part of the copy was altered, and the engine has it as it was")
            return None
        threads = self.threads or min(torch.get_num_threads(), most_threads())
        engine = self._engines.get(threads)
        if engine is None:
            with self._lock:
                engine = self._engines.get(threads)
                if engine is None:
                    engine = Engine(self._folded, "float32" if self._dtype == torch.float32 else "bfloat16", threads)
                    self._engines[threads] = engine
        return engine

    def __getattr__(self, name: str) -> Any:
        if name == "network":
            self._handed_out = True
        return super().__getattr__(name)

    def named_modules(self, *arguments: Any, **options: Any) -> Any:
        self._handed_out = True
        return super().named_modules(*arguments, **options)

    def named_children(self) -> Any:
        self._handed_out = True
        return super().named_children()

    def train(self, mode: bool = True) -> InferenceModel:
        if mode:
            raise RuntimeError("an inference model cannot be trained: train the model it was made from")
        return super().train(False)

    def _prepare(self) -> None:
        """What a copy, or another process, has to make anew."""
        self._handed_out = False
        self._engines: dict[int, Engine] = {}
        self._lock = threading.Lock()
        self._watch()

    def _watch(self) -> None:
        """Remember the network as it is: the engine serves while nobody hooks into it, alters it or writes to it."""
        network = cast(Classifier, self._modules["network"])
        parts = list(network.modules())
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._tokens = network.tokens
        self._values = [value for value in network.parameters() if not value.is_inference()]
        self._versions = sum(map(_version, self._values))
        self._look()
        self._state = self._now()

    def _look(self) -> None:
        """Keep the dictionaries that say what the parts are, so that each call only has to read them."""
        self._owns = list(map(vars, cast(Classifier, self._modules["network"]).modules()))
        self._settled = [
            (itemgetter(*names), [own for own in self._owns if own.keys() >= set(names)]) for names in _SETTINGS
        ]
        inside = [own[kind] for own in self._owns for kind in ("_parameters", "_buffers", "_modules")]
        self._inside = [held for held in inside if held]

    def _now(self) -> tuple[list[Any], list[int], list[Any]]:
        """Settings, numbers of attributes, and the tensors and parts that every part holds."""
        settings = [list(map(read, owns)) for read, owns in self._settled]
        return settings, list(map(len, self._owns)), list(chain.from_iterable(map(dict.values, self._inside)))

    def _written(self) -> bool:
        return sum(map(_version, self._values)) != self._versions

    def _altered(self) -> bool:
        """Whether a part has another attribute, setting, parameter or part inside than when it was watched.

        A look at all of them takes longer than it seems, for the engine has driven them out of the caches. So nobody
        looks before the parts were given to somebody: they are reached by `network` and by walking the modules alone.
        """
        if not self._handed_out:
            return False
        if vars(self._modules["network"]) is not self._owns[0]:  # torch.export puts other dictionaries there
            self._look()
        try:
            return self._now() != self._state
        except RuntimeError:  # two tensors that are not one have no single answer whether they are equal
            return True

    def _apply(self, fn: Any, recurse: bool = True) -> InferenceModel:
        if self._written() or self._altered():
            self._folded = None
        super()._apply(fn, recurse)
        self._watch()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in _MADE_ANEW}
        return state | {"_folded": None} if self._written() or self._altered() else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()


def _folded(model: Classifier, network: Classifier, dtype: torch.dtype) -> FoldedNetwork | None:
    """What the engine runs, or None: in silence where PyTorch is meant, with a warning where something is missing."""
    if dtype == torch.float64 or not model.use_fused or not model.tokens.is_cpu:
        return None
    reason = library.why_not() or parts_of_its_own(model)
    if reason is None and hooked_part(network) is not None and any(isinstance(m, ConvNorm) for m in network.modules()):
        return None  # somebody watches what the engine would join: PyTorch is meant
    if reason is None:
        try:
            return FoldedNetwork(describe(model), arrays_of(network))
        except ValueError as error:
            reason = " ".join(str(error).split())
    _fall_back(reason)
    return None


def _fall_back(reason: str) -> None:
    """Say once for each reason that PyTorch runs where the engine was to be expected."""
    message = f"to_inference: not the CPU engine but the folded network in PyTorch serves ({reason})"
    if switch("MF_KERNELS_STRICT"):
        raise RuntimeError(f"{message}; MF_KERNELS_STRICT={os.environ['MF_KERNELS_STRICT']} makes this an error")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{message}; see `python -m mobileformer info`", KernelFallbackWarning, stacklevel=5)


def _wants_numbers_only(x: Tensor) -> bool:
    """Whether a call on this tensor is one for the engine: no gradient wanted, nobody tracing or transforming it."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_transformed()
        and not watched_globally()
    )
