"""A judging process: it does one job after another, until one may have left something behind.

It runs inside a confined fork of the zygote. A judge reads its job and nothing that a program could have
written: its code was imported before the first program ran.
"""

from __future__ import annotations

import _thread
import builtins
import os
import resource
import socket
from collections.abc import Callable

from rewards.sandbox import reaper

MAX_SERVED = 256
# Growth of memory since the first job; more may be lasting and would starve the next job.
MAX_GROWTH_KIB = 128 << 10
LINK_IN, LINK_OUT, EXTRA, SOURCE = 3, 4, 5, 6  # descriptors of programs and judges, besides 0, 1 and 2


def serve(judge: Callable[[bytes], int], control: socket.socket) -> None:
    """Judges until the socket closes, a job fails, or tests or values may have left something behind."""
    builtins_before = dict(vars(builtins))
    size_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    max_cpu_s = resource.getrlimit(resource.RLIMIT_CPU)[0] / 2  # the other half is for the last job
    again, num_served = True, 0
    while again:
        message, fds, _, _ = socket.recv_fds(control, 16, 4)
        if not message:
            return
        for target, descriptor in zip((SOURCE, EXTRA, LINK_IN, LINK_OUT), fds, strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        num_served += 1
        try:
            status = judge(os.pread(SOURCE, os.fstat(SOURCE).st_size, 0))
            clean = status == 0 and vars(builtins) == builtins_before and _thread._count() == 0
            used = resource.getrusage(resource.RUSAGE_SELF)
            is_small = used.ru_maxrss - size_before <= MAX_GROWTH_KIB
            is_young = num_served < MAX_SERVED and used.ru_utime + used.ru_stime < max_cpu_s
            again = clean and is_small and is_young
        except BaseException:
            again = False
        for target in (SOURCE, EXTRA, LINK_IN, LINK_OUT):
            os.dup2(0, target)
        control.send(reaper.AGAIN if again else reaper.LAST)
