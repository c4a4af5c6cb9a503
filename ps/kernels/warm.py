"""Compile every kernel into the on-disk cache, or load it from there: `python -m ps.kernels.warm`.

The cache has one writer: `ps.cluster.start` runs this in a process of its own before servers begin. A server then
warms up itself, which only loads, so that no request waits for a compiler.
"""

from ps.kernels import warmup

if __name__ == "__main__":
    warmup()
