"""Replication of a server's slots, sans-IO: `Replication` is what a service drives."""

from ps.replication.actions import Action, Answer, Forward, Refuse, ReplicationLimits, Send, SendView
from ps.replication.machine import ADMISSION, COMPLAINT, HELD, LESSON, NOTHING, Replication, Standing

__all__ = [
    "ADMISSION",
    "COMPLAINT",
    "HELD",
    "LESSON",
    "NOTHING",
    "Action",
    "Answer",
    "Forward",
    "Refuse",
    "Replication",
    "ReplicationLimits",
    "Send",
    "SendView",
    "Standing",
]
