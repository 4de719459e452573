"""Fused kernels for Mobile-Former: four operators, each with a reference, C++ kernels and gradients.

Knows nothing of the model. Importing this loads no compiled library; the first call that can use one does.
"""

from mf_kernels import reference
from mf_kernels._registry import KernelFallbackWarning, KernelRecord, record_kernels, use_backend
from mf_kernels._status import status
from mf_kernels.ops.depthwise_conv2d import depthwise_conv2d
from mf_kernels.ops.dynamic_relu import dynamic_relu
from mf_kernels.ops.former_to_mobile import former_to_mobile
from mf_kernels.ops.mobile_to_former import mobile_to_former

__all__ = [
    "KernelFallbackWarning",
    "KernelRecord",
    "depthwise_conv2d",
    "dynamic_relu",
    "former_to_mobile",
    "mobile_to_former",
    "record_kernels",
    "reference",
    "status",
    "use_backend",
]
