"""A destination QEMU's command line, made to run on our segments.

Pure: arguments in, arguments out.  What makes the machine's RAM (`-m`, `-machine memory-backend=`,
`-numa node,memdev=`, `-device pc-dimm,memdev=`) becomes a shared file backend on the segment of the
source's block; everything else stays as the user wrote it.  What cannot be combined is refused by
name before anything starts.
"""

from sharded_pc.errors import UsageError
from sharded_pc.qemu_args.plans import Backend, Plan, check_arguments, plan

__all__ = ["check_arguments", "plan", "Plan", "Backend", "UsageError"]
