"""Triton kernels, one file for each operator; imported only when one of them has to run."""
