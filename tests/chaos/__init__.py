"""Real processes killed and stopped under load: `python -m tests.chaos --help`."""
