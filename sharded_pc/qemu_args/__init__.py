"""A destination QEMU's command line, made to run on our segments.

Pure: arguments in, arguments out.  What makes the machine's RAM (`-m`, `-machine memory-backend=`,
`-numa node,memdev=`, `-device pc-dimm,memdev=`) becomes a shared file backend on a segment;
everything else stays as the user wrote it.  What cannot be combined is refused by name before
anything starts.  Nothing of the source needs to be known; when its block list comes, `match` says
which of its blocks each backend stands for.
"""

from sharded_pc.errors import UsageError
from sharded_pc.qemu_args.back_ends import BackEnd
from sharded_pc.qemu_args.plans import Backend, backends, check_arguments, match, plan

__all__ = ["check_arguments", "backends", "plan", "match", "Backend", "BackEnd", "UsageError"]
