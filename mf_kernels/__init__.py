"""Fused kernels for Mobile-Former: knows nothing of the model."""

from mf_kernels import reference
from mf_kernels.reference import depthwise_conv2d, dynamic_relu, former_to_mobile, mobile_to_former

__all__ = ["depthwise_conv2d", "dynamic_relu", "former_to_mobile", "mobile_to_former", "reference"]
