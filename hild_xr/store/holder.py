"""Who holds a lease, in words and in JSON."""

from __future__ import annotations

import json
import os
import socket
import time

from pydantic import JsonValue


def this_process() -> dict[str, JsonValue]:
    """Return host, process and the present time.

    Examples
    --------
    >>> sorted(this_process())
    ['host', 'pid', 'since']
    """
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def read(stored: bytes) -> dict[str, JsonValue]:
    """Return a holder as it was stored; empty if it cannot be read, as when it is only half written."""
    try:
        holder = json.loads(stored)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def in_words(stored: bytes) -> str:
    """Name a stored holder.

    Examples
    --------
    >>> in_words(b'{"host": "node7", "pid": 42, "since": "2026-11-22T05:42:27+0000"}')
    'process 42 on node7 since 2026-11-22T05:42:27+0000'
    >>> in_words(b"")
    'another process that has just started'
    """
    holder = read(stored)
    if not holder.keys() >= {"host", "pid", "since"}:
        return "another process that has just started"
    return "process {pid} on {host} since {since}".format_map(holder)
