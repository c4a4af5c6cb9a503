"""Kernels: free functions over plain arrays, compiled by numba, serial, without the GIL.

Symbols used in every signature comment:

    n ids of a request      m bags      u unique ids      d width of a row      w floats of optimizer state
    F features of a share   s slots     c clients         r rows of a matrix

Conventions, all of them here:
  * `kernel` decorates what Python calls, `inline` what kernels call. Both compile without fastmath (values may be
    anything) and without `parallel` (two threads inside numba's workqueue layer abort the process; parallelism comes
    from servers, one data thread each).
  * Outputs are written in place and stand last. A kernel checks nothing: its caller did.
  * Inputs pass through `as_input` once, so that no read-only or unaligned array asks for a second compilation in the
    middle of a request.
  * The on-disk cache has one writer: `warmup()` compiles every kernel, before servers start.
"""

import hashlib
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import DTypeLike, NDArray

from hashring import tokens


def _cache_folder() -> str:
    """Where compiled kernels are kept: a folder for each state of all kernels' sources.

    numba's own cache looks at a function's file alone; a kernel would go on with what it calls in another file as that
    was before a change, and write rows by two layouts.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for source in [*sorted(here.glob("*.py")), Path(tokens.__file__)]:
        digest.update(source.read_bytes())
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or here / "__pycache__")
    if not os.access(base if base.exists() else base.parent, os.W_OK):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embring"
    return str(base / f"kernels-{digest.hexdigest()[:16]}")


_CACHE_FOLDER = _cache_folder()


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def decorated(function: Callable[..., Any]) -> Any:
        config: Any = numba.config
        before = config.CACHE_DIR
        config.CACHE_DIR = _CACHE_FOLDER  # read while the function is decorated
        try:
            return numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", **options)(function)
        finally:
            config.CACHE_DIR = before

    return decorated


kernel = _compiled()
"""Decorates a kernel that Python calls."""

inline = _compiled(forceinline=True)
"""Decorates a function that only kernels call. LLVM has to inline it: left to itself it calls the larger ones, and a
call counts the references of every array that it is given, with two atomic instructions each."""

u64: Any = np.uint64
"""a[u64(i)] where i is known to be no less than 0: numba has a signed index tested, and wrapped, at every access."""

BATCH = 64
"""Ids that a lookup keeps in flight: their cache lines are asked for before the first is needed."""

KERNEL_MODULES = (
    "index", "plan", "scan", "pool", "update", "optimize", "window", "batch", "split", "merge", "replicate",
    "shared",
)  # fmt: skip


def _prefetch(typingctx: Any, array: Any, position: Any) -> Any:
    """Ask for the cache line of element `position` (flat, C order) of `array`, to read it soon."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        i32 = ir.IntType(32)
        declared = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, declared, "llvm.prefetch.p0")
        # read, keep in every cache level, data
        builder.call(function, [address, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


prefetch: Any = intrinsic(_prefetch)
"""prefetch(array, position): see `_prefetch`."""


class _Borrowed:
    """Carries an array interface, so that numpy builds a second array over the same memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.owner = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def as_input(array: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """`array` as a kernel takes it: C-contiguous, aligned, of `dtype`, and of a writeable *type*.

    Bytes from a socket come as read-only arrays, which numba would compile every kernel for a second time. Kernels
    never write to their inputs, so the memory is shared and only the flag is left behind.
    """
    if type(array) is np.ndarray and array.dtype == dtype and array.flags.carray:
        return array
    ready = np.require(array, dtype, ("C", "A"))
    return ready if ready.flags.writeable else np.asarray(_Borrowed(ready))


def warmup() -> None:
    """Compile every kernel once, into the on-disk cache: call it in one process, before servers start."""
    for name in KERNEL_MODULES:
        import_module(f"ps.kernels.{name}").warmup()
