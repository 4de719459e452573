"""One network several ways: same weights, same input, plain and fused, checked before they are timed.

Legend: B batch, C input channels, H W height and width.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mf_kernels
import mobileformer
from mobileformer.inference import InferenceModel
from mobileformer.measure.difference import Difference, difference, lively_weights_
from mobileformer.measure.timing import Timing, interleaved

__all__ = ["EAGER", "RUNTIMES", "Contender", "Trial", "stack_photo"]

Progress = Callable[[Iterable[Any]], Iterable[Any]]

EAGER = ("eager", "eager channels_last")
RUNTIMES = ("onnxruntime", "openvino")

# Beyond these a contender is not timed.
# Logits: largest |difference| from the float64 reference over the largest |logit|. Plain PyTorch has 2e-6 in
# float32, 2e-2 in bfloat16, 2e-4 when training, where the batch's own statistics amplify rounding.
# Gradients: norm of the difference over the norm. Plain PyTorch has up to 1e-2: where rounding pushes a value
# across a kink of an activation, its gradient changes at once.
LOGIT_BOUNDS = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 0.1}
TRAINING_LOGIT_BOUND, TRAINING_GRADIENT_BOUND = 1e-3, 5e-2


@dataclass
class Contender:
    """One way to run the network, and what was found out about it."""

    name: str
    network: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    x: Tensor
    difference: Difference | None = None  # of logits
    gradient_difference: float | None = None  # relative, when training
    kernels: dict[str, int] = field(default_factory=dict)  # calls of one run, by what served them
    error: str | None = None
    timing: Timing | None = None

    @property
    def right(self) -> bool:
        return self.difference is not None and self.error is None


class Trial:
    """Contenders on one input: `add` them, `check` each against float64, `time` those that are right.

    x (B,C,H,W) is float32 on the CPU; every contender gets it in `dtype` on `device`, and has its weights so.
    The reference is float64, plain PyTorch, NCHW, on the CPU, from the same weights and x rounded to `dtype`.
    Weights are random (`lively_weights_`): speed does not depend on them, and errors show.
    """

    def __init__(
        self,
        variant: str,
        x: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        train: bool = False,
        seed: int = 0,
        num_classes: int = 1000,
    ) -> None:
        self.dtype, self.device, self.train = dtype, torch.device(device), train
        self.contenders: list[Contender] = []
        self._variant = variant
        self._plain = mobileformer.Model(variant, num_classes=num_classes, in_chans=x.shape[1], use_fused=False)
        lively_weights_(self._plain, seed)
        self._x = x.to(self.device, dtype)
        self._target = torch.arange(len(x), device=self.device) * 97 % self._plain.num_classes
        # Rounded to the dtype first: a contender's error is that of its arithmetic, not of its input.
        exact = copy.deepcopy(self._plain).to(dtype).double().train(train)
        reference = Contender("float64", exact, list(exact.parameters()), x.to(dtype).double())
        self.reference, self._gradient = self._logits_and_gradient(reference)

    def add(self, *names: str) -> None:
        """Build contenders: "eager", "eager channels_last", "compile", "fused", "fused inference", and `RUNTIMES`."""
        for name in names:
            model = self._plain
            if name in RUNTIMES:
                self.contenders.append(Contender(name, self._runtime(name), [], self._x))
                continue
            if name.startswith("fused"):
                plain = self._plain
                model = mobileformer.Model(self._variant, num_classes=plain.num_classes, in_chans=plain.in_chans)
                mobileformer.load_weights(model, self._plain.state_dict())
            model = copy.deepcopy(model).to(self.device, self.dtype).train(self.train)
            x, network = self._x, model
            if name == "eager channels_last":
                network = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
                x = x.contiguous(memory_format=torch.channels_last)
            elif name == "compile":
                network = torch.compile(model)
            elif name == "fused inference":
                network = model.to_inference(dtype=self.dtype)
            self.contenders.append(Contender(name, network, list(model.parameters()), x))

    def _runtime(self, name: str) -> Callable[[Tensor], Tensor]:
        """The exported network in another runtime, compiled for this very shape and PyTorch's number of threads.

        Raises ExportError where the runtime or what writes its files is missing, RuntimeError where it cannot compute
        in this dtype.
        """
        from mobileformer.export.job import require
        from mobileformer.race import runtimes

        require("export", "onnx", "onnxscript", name)
        shape, threads = tuple(self._x.shape), torch.get_num_threads()
        if name == "onnxruntime":
            if self.dtype != torch.float32:
                raise RuntimeError(f"on the CPU it computes in float32, not in {self.dtype}")
            run = runtimes.onnxruntime_session(self._exported, shape, threads=threads)
        else:
            precision = "f32" if self.dtype == torch.float32 else "bf16"
            run = runtimes.openvino_model(self._exported, shape, threads=threads, precision=precision)
        return lambda x: torch.from_numpy(run(x.float().numpy()))

    @cached_property
    def _exported(self) -> Path:
        """The network as an ONNX file, in a folder that goes with this trial."""
        from mobileformer.export import export_model

        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / "network.onnx"
        height, width = self._x.shape[2:]
        export_model(self._plain, path, "onnx", size=(height, width), check=False)
        return path

    def check(self, progress: Progress = iter) -> bool:
        """Run each contender once and compare. True when all are within bounds."""
        for contender in progress(self.contenders):
            try:
                with mf_kernels.record_kernels() as record:
                    logits, gradient = self._logits_and_gradient(contender)
                    contender.kernels = _calls_by_backend(record.counts) or _engine_of(contender.network)
            except RuntimeError as error:  # torch.compile without a compiler, a kernel that cannot serve
                contender.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                continue
            contender.difference = difference(logits, self.reference)
            bound = TRAINING_LOGIT_BOUND if self.train else LOGIT_BOUNDS[self.dtype]
            self._hold(contender, "logits", contender.difference.relative, bound)
            if gradient is not None and self._gradient is not None:
                off = ((gradient - self._gradient).norm() / self._gradient.norm()).item()
                contender.gradient_difference = off
                self._hold(contender, "gradients", off, TRAINING_GRADIENT_BOUND)
        return all(contender.right for contender in self.contenders)

    @staticmethod
    def _hold(contender: Contender, what: str, off: float, bound: float) -> None:
        if not off <= bound:  # written so that NaN does not pass
            contender.error = f"{what} are off by {off:.1e} of the reference, more than {bound:g}: not timed"

    def time(self, repeats: int, progress: Progress = iter) -> None:
        """Time, in turns, the contenders that `check` found right."""
        runs = {contender.name: self.runner(contender) for contender in self.contenders if contender.right}
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else None
        if runs:
            timings = interleaved(runs, repeats=repeats, synchronize=synchronize, progress=progress)
            for contender in self.contenders:
                contender.timing = timings.get(contender.name)

    def rows(self) -> list[dict[str, Any]]:
        """What was found, as plain data. `speedup`: min of the faster eager layout over min of this one."""
        eager = [c.timing.min_ms for c in self.contenders if c.name in EAGER and c.timing is not None]
        return [
            {
                "name": c.name,
                "min_ms": c.timing.min_ms if c.timing else None,
                "median_ms": c.timing.median_ms if c.timing else None,
                "speedup": min(eager) / c.timing.min_ms if c.timing and eager else None,
                "logit_difference": c.difference.largest if c.right and c.difference else None,
                "relative_logit_difference": c.difference.relative if c.right and c.difference else None,
                "relative_gradient_difference": c.gradient_difference if c.right else None,
                "kernels": c.kernels,
                "error": c.error,
            }
            for c in self.contenders
        ]

    def _logits_and_gradient(self, contender: Contender) -> tuple[Tensor, Tensor | None]:
        """Logits in float64, and when training the gradient of all parameters in a row."""
        if not self.train:
            with torch.inference_mode():
                return contender.network(contender.x).double().cpu(), None
        logits = contender.network(contender.x)
        loss = F.cross_entropy(logits.double(), self._target.to(logits.device))
        gradients = torch.autograd.grad(loss, contender.parameters)
        return logits.detach().double().cpu(), torch.cat([g.double().cpu().flatten() for g in gradients])

    def runner(self, contender: Contender) -> Callable[[], object]:
        """What is timed: a forward pass; or forward, cross entropy, backward and AdamW."""
        network, x, target = contender.network, contender.x, self._target
        if not self.train:

            def forward() -> Tensor:
                with torch.inference_mode():
                    return network(x)

            return forward
        # At rate 0 the optimizer does all its work and the next step is the same work again.
        optimizer = torch.optim.AdamW(contender.parameters, lr=0.0, weight_decay=0.0)

        def step() -> None:
            F.cross_entropy(network(x), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def stack_photo(photo: Tensor, batch: int) -> Tensor:
    """(C,H,W) -> (B,C,H,W), every copy shifted around: equal images would leave training no variance."""
    return torch.stack([photo.roll((16 * i, 8 * i), (1, 2)) for i in range(batch)])


def _engine_of(network: Callable[[Tensor], Tensor]) -> dict[str, int]:
    """{"engine:cpu:avx2": 1} for a copy for inference that the engine serves; it runs no operator that could count."""
    engine = network.engine if isinstance(network, InferenceModel) else None
    return {} if engine is None else {f"engine:cpu:{engine.isa}": 1}


def _calls_by_backend(counts: dict[str, int]) -> dict[str, int]:
    """{"dynamic_relu_fwd:native:cpu:avx2": 3, ...} -> {"native:cpu:avx2": 3, ...}, summed over operators."""
    calls: Counter[str] = Counter()
    for kernel, count in counts.items():
        calls[kernel.partition(":")[2]] += count
    return dict(calls)
