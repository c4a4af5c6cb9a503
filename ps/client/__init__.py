"""The client: routing, splitting, retries and merging (without input or output), and two shells over the fabric.

batch     what a user hands in, checked and joined
routing   what a view says about tables and slots, as arrays
request   a batch split into calls to servers, replies merged into the answer
window    client id and sequences
core      when to retry, where, and when to give up; learning newer views
verbs     each verb, as a generator of commands;  ranges: the range pull
connect   where the cluster is
blocking  Client, driven by flight        aio  AsyncClient
"""

from ps.client.aio import AsyncClient
from ps.client.blocking import Client, PushHandle, connect
from ps.client.verbs import ClientStatistics, RowRange

__all__ = ["AsyncClient", "Client", "ClientStatistics", "PushHandle", "RowRange", "connect"]
