"""The `embring` command, the data sets of its demo, and files for running a cluster."""
