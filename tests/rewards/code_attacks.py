"""Hostile programs, by what they try. Run them in a sandbox only.

Each is tried against tests of `add` or of a program that prints the sum of two numbers, and must get 0; it
starts with a wrong answer, so that only a successful trick could score.
"""

from __future__ import annotations

WRONG = """def add(a, b):
    return 0
"""
ADD_TESTS = {
    "type": "asserts",
    "entry_point": "add",
    "code": "assert add(2, 3) == 5\nassert add(-1, 1) == 0\nassert add(10**20, 1) == 10**20 + 1",
}
SUM_TESTS = {
    "type": "stdio",
    "cases": [{"input": "2 3\n", "output": "5\n"}, {"input": "10 -4\n", "output": "6\n"}],
}

AGAINST_ASSERTS: dict[str, str] = {
    # Endings that look like success.
    "exit at import": WRONG
    + """import sys
sys.exit(0)
""",
    "exit in the call": """import os
def add(a, b): os._exit(0)
""",
    "SystemExit in the call": """def add(a, b): raise SystemExit(0)
""",
    "GeneratorExit in the call": """def add(a, b): raise GeneratorExit
""",
    "StopIteration in the call": """def add(a, b): raise StopIteration
""",
    "quit by signal": """import os, signal
def add(a, b): os.kill(os.getpid(), signal.SIGTERM)
""",
    "a daemon thread that exits": WRONG
    + """import threading, os, time
threading.Timer(0.01, os._exit, [0]).start()
""",
    # Values that claim to be right.
    "equal to all": """class E:
    __eq__ = lambda s, o: True
    __hash__ = None
def add(a, b): return E()
""",
    "reflected equality of a subclass": """class I(int):
    __eq__ = lambda s, o: True
    __hash__ = int.__hash__
def add(a, b): return I(0)
""",
    "a tuple subclass": """class T(tuple):
    __eq__ = lambda s, o: True
def add(a, b): return T()
""",
    "a class as the value": """class M(type):
    __eq__ = lambda s, o: True
    __hash__ = None
class C(metaclass=M): pass
def add(a, b): return C
""",
    "a named attribute instead": """class R:
    def __getattr__(s, n): return lambda *a: True
def add(a, b): return R()
""",
    "a pickle bomb": """class P:
    def __reduce__(s):
        import os
        return os.system, ('touch /tmp/PWNED_reduce',)
def add(a, b): return P()
""",
    "a forged frame on the pipe": WRONG
    + """import os, json
b = json.dumps(['ok', 5, [], []]).encode()
os.write(4, len(b).to_bytes(4, 'little') + b)
""",
    "many forged frames": WRONG
    + """import os
b = b'["ok",5,[],[]]'
[os.write(4, len(b).to_bytes(4, 'little') + b) for _ in range(9)]
import time; time.sleep(0.2)
""",
    "a forged verdict on every descriptor": WRONG
    + """import os
for d in range(64):
    try:
        os.write(d, b'{"outcome": "passed", "num_calls": 3}\\n')
    except OSError: pass
""",
    "a forged exception": """class AssertionErrorX(AssertionError): pass
def add(a, b): raise AssertionErrorX('passed')
""",
    "a value in itself": """def add(a, b):
    d = {}
    d['d'] = [d]
    return d
""",
    "deep nesting": """def add(a, b):
    x = []
    for _ in range(10**5): x = [x]
    return x
""",
    "a giant value": """def add(a, b): return 'x' * (1 << 28)
""",
    "a giant integer": """def add(a, b): return 1 << (1 << 28)
""",
    "an endless iterator": """import itertools
def add(a, b): return itertools.count()
""",
    # The interpreter around it.
    "patched builtins": WRONG
    + """import builtins
for n in ('abs', 'len', 'isinstance', 'type', 'eval', 'compile'):
    setattr(builtins, n, lambda *a, **k: True)
""",
    "patched json": WRONG
    + """import json
json.JSONEncoder.encode = lambda *a: '["ok",5,[],[]]'
json.dumps = json.JSONEncoder.encode
""",
    "the harness's modules": WRONG
    + """import sys
for n, m in list(sys.modules.items()):
    if n.startswith('rewards'):
        for k in list(vars(m)):
            if not k.startswith('__'): setattr(m, k, lambda *a, **k: 5)
""",
    "frames": """import sys
def add(a, b):
    f = sys._getframe()
    while f:
        for v in list(f.f_locals.values()) + list(f.f_globals.values()):
            if isinstance(v, str) and 'assert' in v: raise SystemExit(0)
            if isinstance(v, list): v.append('passed')
        f = f.f_back
    return 0
""",
    "the heap": WRONG
    + """import gc
found = [o for o in gc.get_objects() if isinstance(o, dict) and 'num_calls' in o]
for o in found: o['outcome'] = 'passed'
""",
    "trace and profile hooks": WRONG
    + """import sys, threading
sys.settrace(lambda *a: None)
sys.setprofile(lambda *a: None)
sys.excepthook = lambda *a: None
""",
    "raw memory": WRONG
    + """import ctypes
ctypes.memset(id(0), 0, 64)
""",
    "an audit hook": WRONG
    + """import sys
def h(e, a): raise SystemExit(0)
sys.addaudithook(h)
""",
    # The machine.
    "fork bomb": WRONG
    + """import os
while True:
    try:
        os.fork()
    except OSError: pass
    else: continue
    break
""",
    "double fork": WRONG
    + """import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: pass
""",
    "raw clone": WRONG
    + """import ctypes
l = ctypes.CDLL(None)
for n, a in ((56, 17), (57, 0), (58, 0), (435, 0)):
    r = l.syscall(n, a, 0, 0, 0, 0)
    if r == 0:
        while True: pass
""",
    "subprocess": WRONG
    + """import subprocess
subprocess.run(['/bin/sh', '-c', 'touch /tmp/PWNED_sh'])
""",
    "os.system": WRONG
    + """import os
os.system('touch /tmp/PWNED_system; sleep 100 &')
""",
    "multiprocessing": WRONG
    + """import multiprocessing
multiprocessing.Process(target=print).start()
""",
    "threads without end": WRONG
    + """import threading, time
try:
    while True: threading.Thread(target=time.sleep, args=(99,)).start()
except Exception: pass
""",
    "memory in pieces": """x = []
while True: x.append(bytearray(1 << 24))
""",
    "shared memory": """import mmap
x = []
while True:
    m = mmap.mmap(-1, 1 << 26); m.write(b'x' * (1 << 26)); x.append(m)
""",
    "recursion": """import sys
sys.setrecursionlimit(1 << 30)
def add(a, b): return add(b, a)
""",
    "files everywhere": WRONG
    + """import os
for p in ('.', '/tmp', '/dev/shm', '/var/tmp', os.path.expanduser('~')):
    for f in (os.O_CREAT | os.O_WRONLY, os.O_CREAT | os.O_RDWR | os.O_EXCL, os.O_TMPFILE | os.O_RDWR):
        try:
            os.close(os.open(p + '/PWNED_file', f))
        except OSError: pass
    for make in (os.mkdir, os.mkfifo):
        try:
            make(p + '/PWNED_dir')
        except OSError: pass
""",
    "links": WRONG
    + """import os
for make in (os.symlink, os.link):
    try:
        make('/etc/passwd', '/tmp/PWNED_link')
    except OSError: pass
""",
    "renames": WRONG
    + """import os
try:
    os.rename('/tmp', '/tmp2')
except OSError: pass
""",
    "other processes' memory": WRONG
    + """import os
for p in (os.getppid(), 1, 'self'):
    for f in ('mem', 'environ', 'cmdline', 'maps'):
        try:
            open(f'/proc/{p}/{f}', 'rb').read(1); import sys; add = lambda a, b: a + b
        except OSError: pass
""",
    "secrets": WRONG
    + """import os
if len(os.environ) > 8 or any('TOKEN' in name for name in os.environ):
    add = lambda a, b: a + b
""",
    "kill the others": WRONG
    + """import os, signal
for p in (0, -1, os.getppid(), 1):
    try:
        os.kill(p, signal.SIGKILL)
    except OSError: pass
""",
    "signal through fcntl": WRONG
    + """import fcntl, os, signal
r, w = os.pipe()
try:
    fcntl.fcntl(r, 8, os.getppid()); fcntl.fcntl(r, 10, 9)
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x')
except OSError: pass
""",
    "ptrace": WRONG
    + """import ctypes, os
l = ctypes.CDLL(None)
if l.ptrace(16, os.getppid(), 0, 0) == 0: add = lambda a, b: a + b
""",
    "sockets": WRONG
    + """import socket
for f in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 17, 38, 40):
    for t in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            socket.socket(f, t); add = lambda a, b: a + b
        except OSError: pass
""",
    "a datagram pair": WRONG
    + """import socket
try:
    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); add = lambda a, b: a + b
except OSError: pass
""",
    "lasting kernel objects": WRONG
    + """import ctypes
l = ctypes.CDLL(None)
made = [l.shmget(0x5157, 4096, 0o1666), l.msgget(0x5157, 0o1666), l.semget(0x5157, 1, 0o1666)]
if max(made) >= 0: add = lambda a, b: a + b
""",
    "a life after the parent": WRONG
    + """import ctypes
if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0: add = lambda a, b: a + b
""",
    "all descriptors closed": WRONG
    + """import os
os.closerange(0, 99)
""",
    "the source with a byte-order trick": WRONG
    + """# -*- coding: utf-7 -*-
""",
    "no function at all": """print('All tests passed')
""",
    "the tests themselves": WRONG
    + """def check(*a): return True
candidate = lambda *a: 5
""",
}

AGAINST_OUTPUT: dict[str, str] = {
    "every answer at once": """print('5\\n6')
""",
    "the answer and more": """print(5)
print(6)
""",
    "the answer, then a crash": """print(sum(map(int, input().split())), flush=True)
raise ValueError
""",
    "the answer, then a signal": """import os
print(sum(map(int, input().split())), flush=True)
os.abort()
""",
    "the answer, then for ever": """print(sum(map(int, input().split())), flush=True)
while True: pass
""",
    "the answer, then sleep": """import time
print(sum(map(int, input().split())), flush=True)
time.sleep(99)
""",
    "the answer on stderr": """import sys
print(sum(map(int, input().split())), file=sys.stderr)
""",
    "the answer and a thread that stays": """import threading, time
print(sum(map(int, input().split())), flush=True)
threading.Thread(target=time.sleep, args=(99,)).start()
""",
    "too much output": """import sys
while True: sys.stdout.write('5\\n' * 4096)
""",
    "a hole in the output": """import os
print(5, flush=True)
os.lseek(1, 1 << 40, 0)
os.write(1, b'x')
""",
    "no output": """""",
    "overwritten output": """import os
os.write(1, b'7\\n')
os.lseek(1, 0, 0)
os.write(1, b'5')
""",
    "output of the descriptors": """import os
for d in range(3, 64):
    try:
        print(os.read(d, 99))
    except OSError: pass
""",
}

HONEST_ASSERTS: dict[str, str] = {
    "plain": """def add(a, b): return a + b
""",
    "prints while it works": """def add(a, b):
    print('adding', a, b)
    return a + b
""",
    "a main part that must not run": """def add(a, b): return a + b
if __name__ == '__main__': raise SystemExit(3)
""",
    "threads": """from concurrent.futures import ThreadPoolExecutor
def add(a, b):
    with ThreadPoolExecutor(4) as p: return sum(p.map(int, (a, b)))
""",
    "dataclasses": """from dataclasses import dataclass
@dataclass
class P:
    a: int
    b: int
def add(a, b):
    p = P(a, b)
    return p.a + p.b
""",
    "an enumeration as the value": """import enum
add = lambda a, b: enum.IntEnum('E', {'X': a + b}).X
""",
    "a file that is not there": """def add(a, b):
    try:
        open('/no/such/file')
    except OSError: return a + b
""",
    "a signal to itself": """import signal, os
got = []
signal.signal(signal.SIGALRM, lambda *a: got.append(1))
os.kill(os.getpid(), signal.SIGALRM)
def add(a, b): return a + b + len(got) - 1
""",
    "memory within the limit": """x = bytearray(300 << 20)
def add(a, b): return a + b
""",
    "asyncio": """import asyncio
async def f(a, b):
    await asyncio.sleep(0)
    return a + b
def add(a, b): return asyncio.run(f(a, b))
""",
}

HONEST_OUTPUT: dict[str, str] = {
    "plain": """a, b = map(int, input().split())
print(a + b)
""",
    "the whole input": """import sys
print(sum(map(int, sys.stdin.buffer.read().split())))
""",
    "raw output": """import os
os.write(1, str(sum(map(int, open(0).read().split()))).encode())
""",
    "exit status 0": """import sys
print(sum(map(int, input().split())))
sys.exit()
""",
    "os._exit after a flush": """import os
print(sum(map(int, input().split())), flush=True)
os._exit(0)
""",
    "closed streams": """import sys
print(sum(map(int, input().split())))
sys.stdout.close()
sys.stderr.close()
""",
    "noise on stderr": """import sys
print('debug', file=sys.stderr)
print(sum(map(int, input().split())))
""",
}
