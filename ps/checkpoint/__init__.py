"""Checkpoints: what lies on disk (files), and how rows get there and back (move)."""
