"""Tokens, the ring, the immutable view, and the planner that makes the next view from it.

Pure: arrays and dataclasses in, arrays and dataclasses out. Knows nothing of rows, sockets, Ray or time.
"""
