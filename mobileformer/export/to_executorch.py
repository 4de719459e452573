"""ExecuTorch, with what its XNNPACK backend takes handed to that."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from mobileformer.export.check import Runtime, in_fresh_process
from mobileformer.export.job import TRACED_SMALLEST, Job, quietly, require, traced

__all__ = ["EDGE", "SMALLEST", "SUFFIX", "TAKES", "require_tools", "runtimes", "write"]

EDGE = True
SMALLEST = TRACED_SMALLEST
SUFFIX = ".pte"
LARGEST_BATCH = 4  # memory is planned for this, and for the size that is traced
TAKES = f"a batch of 1 to {LARGEST_BATCH}"


def require_tools(check: bool) -> None:
    """The same package writes and runs."""
    require("executorch", "executorch")


def write(job: Job, path: Path) -> dict[str, Any]:
    """The form has no place for metadata."""
    with quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.devtools.backend_debug import get_delegation_info
        from executorch.exir import to_edge_transform_and_lower

        program = traced(job, job.dynamic_shapes(largest_batch=LARGEST_BATCH))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        told = get_delegation_info(lowered.exported_program().graph_module)
        path.write_bytes(lowered.to_executorch().buffer)
    # Taking a result out of a tuple is a node, too, but nothing that is run.
    counts = {name: row for name, row in told.delegation_by_operator.items() if name != "getitem"}
    delegated = sum(row.delegated for row in counts.values())
    total = delegated + sum(row.non_delegated for row in counts.values())
    return {
        "nodes": total,
        "delegated": f"{100 * delegated / total:.1f} %",
        "delegated_subgraphs": told.num_delegated_subgraphs,
        "not_delegated": {name: row.non_delegated for name, row in sorted(counts.items()) if row.non_delegated},
    }


def runtimes(path: Path) -> dict[str, Runtime]:
    """In a process of its own, whose runtime may write what it likes."""
    code = """
from executorch.runtime import Runtime
program = Runtime.get().load_program(path)
method = program.load_method("forward")
run = lambda x: method.execute([x])[0].clone()
"""
    return {f"ExecuTorch {version('executorch')}": in_fresh_process(code, path)}
