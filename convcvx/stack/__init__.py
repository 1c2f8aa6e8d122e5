"""Greedy stacks of certified layers."""

from convcvx.stack.jobs import (
    StackRun,
    stack_job,
    stage_data,
)

__all__ = [
    "StackRun",
    "stack_job",
    "stage_data",
]
