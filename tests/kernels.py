"""A pytest plugin for nbval (`-p kernels`): kernels speak over Unix sockets.

TCP ports are chosen before the kernel takes them, so of two kernels started at once one could find its port taken and
die (https://github.com/jupyter/nbconvert/issues/1066).
"""

import os
import tempfile
import uuid

import nbval.kernel
from jupyter_client import KernelManager


def manager_over_sockets(**options) -> KernelManager:
    """A KernelManager whose five sockets are files `kernel-…-1` to `-5`; it removes them at its end."""
    name = os.path.join(tempfile.gettempdir(), f"kernel-{uuid.uuid4().hex}")
    return KernelManager(transport="ipc", ip=name, **options)


if os.name == "posix":
    nbval.kernel.KernelManager = manager_over_sockets
