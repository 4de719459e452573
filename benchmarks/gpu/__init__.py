"""Everything that only a card can tell, in one command: `make gpu`. How to run and read it: docs/gpu.md.

__main__    the driver: sections one after the other, each within its time, and the exit code
section     a section's file: rows as they come, what failed, what was left out
machine     the card, the versions, the measured ceilings
check       the build, `pytest -m gpu`, compute-sanitizer over `small`
operators   both backends, eager and compiled, forward and backward, against float64 and the copy ceiling
models      whole networks, inference and training, and the networks of timm beside them
table       what the files say, for people
graphs      how a call is timed: replays of a CUDA graph
warm        compiles the Triton kernels of all of these beforehand, on every core
"""
