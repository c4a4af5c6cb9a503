"""What `embring bench` runs: each suite gives one JSON-able report."""
