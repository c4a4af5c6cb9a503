"""Compile every kernel into the on-disk cache, or load it from there: `python -m ps.kernels.warm`.

The cache has one writer: `ps.cluster.start` runs this in a process of its own before servers begin. A server then
calls `warm()` itself, which only loads, so that no request waits for a compiler.
"""

from importlib import import_module

from ps.kernels import KERNEL_MODULES


def warm() -> None:
    """Call `warmup()` of every module of kernels that has one."""
    for name in KERNEL_MODULES:
        module = import_module(f"ps.kernels.{name}")
        if hasattr(module, "warmup"):
            module.warmup()


if __name__ == "__main__":
    warm()
