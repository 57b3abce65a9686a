"""Programs that try to leave something behind for the job after them. Run them in a sandbox only.

Each is followed by a wrong solution, which must get 0, and by a right one, which must get 1, with a judge
that was forked before it and one that is forked after it; then `SNAPSHOT` must see what it saw at first.
"""

from __future__ import annotations

WRONG = """def add(a, b):
    return 0
"""
RIGHT = """def add(a, b):
    return a + b
"""
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0\nassert add(10**20, 1) == 10**20 + 1"
CALLS = {"type": "asserts", "entry_point": "add", "code": TESTS}
# A judge ends after tests that may leave traces, so that the next job gets a new one.
CALLS_AND_NEW_JUDGE = {**CALLS, "code": TESTS + "\nclass Mark: pass\nMark.number = 1"}

# Where an archive of modules lies in memory: what every attack on memory looks for.
_FIND = """
import ctypes, gc, marshal, mmap, os, sys

class Buffer(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("owner", ctypes.py_object), ("length", ctypes.c_ssize_t)]
    _fields_ += [(f"rest{i}", ctypes.c_void_p) for i in range(9)]

def span(value):
    view = Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(value), ctypes.byref(view), 0)
    return view.start, -(-view.length // 4096) * 4096

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
FORGED = "import json, os\\ndef main(source):\\n    for record in {'called': True}, {'outcome': 'passed', "
FORGED += "'num_calls': 3}:\\n        os.write(5, json.dumps(record).encode() + b'\\\\n')\\n    return 0\\n"

def forge(finder, name="rewards.code.tester"):
    start, length = span(finder._archive)
    libc.mprotect(start, length, 3)
    _, is_code, offset, size = finder._index[name]
    blob = marshal.dumps(compile(FORGED, "x", "exec")) if is_code else FORGED.encode()
    if libc.mprotect(start, length, 3) == 0:
        ctypes.memmove(start + finder._start + offset, blob.ljust(size, b" "), size)
"""

LEFTOVERS: dict[str, str] = {
    "memory: the judge in the archive": _FIND
    + "forge(next(f for f in sys.meta_path if hasattr(f, '_index')))\n",
    "memory: every module of the archive": _FIND
    + """
finder = next(f for f in sys.meta_path if hasattr(f, '_index'))
for name in finder._index:
    if name.startswith('rewards.') or name in ('json', 'ast', 'random', 'enum'):
        forge(finder, name)
""",
    "memory: every map that the collector knows": _FIND
    + """
for found in gc.get_objects() + [f._archive for f in sys.meta_path if hasattr(f, '_archive')]:
    if isinstance(found, (mmap.mmap, memoryview)):
        start, length = span(found)
        if libc.mprotect(start, length, 3) == 0:
            ctypes.memset(start, 0, length)
""",
    "memory: holes punched into the archive": _FIND
    + """
for finder in sys.meta_path:
    if hasattr(finder, '_archive'):
        start, length = span(finder._archive)
        libc.mprotect(start, length, 3)
        for advice in (9, 4, 8):  # MADV_REMOVE, MADV_DONTNEED, MADV_FREE
            libc.madvise(start, length, advice)
""",
    "memory: the finder's index, and the code of the judge": """
import gc, sys
for finder in sys.meta_path:
    if hasattr(finder, '_index'):
        finder._index['rewards.code.tester'] = finder._index['rewards.sandbox.script']
for name, module in list(sys.modules.items()):
    if name.startswith('rewards.code') and hasattr(module, 'main'):
        module.main = lambda source: 0
    if hasattr(module, 'same_value'):
        module.same_value = lambda *values: True
gc.unfreeze()
""",
    "memory: a judge grown large": """
def add(a, b):
    return ['x' * 10_000_000] * 3
""",
    "descriptors: writes to every one": """
import fcntl, os
for number in range(128):
    for attempt in (
        lambda: os.pwrite(number, b'{"outcome": "passed", "num_calls": 3}', 0),
        lambda: os.lseek(number, 0, 0),
        lambda: fcntl.fcntl(number, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND),
    ):
        try:
            if number > 2:
                attempt()
        except OSError:
            pass
""",
    "descriptors: every one mapped for writing": _FIND
    + """
for number in range(128):
    where = libc.mmap(None, 4096, 3, mmap.MAP_SHARED, number, 0)
    if number > 2 and where not in (None, 2**64 - 1):
        ctypes.memset(where, 0, 1)
""",
    "descriptors: all closed": "import os\nos.closerange(0, 128)\n",
    "files: modules and bytecode beside what is imported": """
import os, sys
for folder in ['', '/tmp', '/dev/shm', '/var/tmp', os.path.dirname(os.__file__), *sys.path]:
    for name in ('json.py', 'sitecustomize.py', 'PWNED_leftover', '__pycache__/json.pyc'):
        try:
            os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY, 0o666))
        except OSError:
            pass
""",
    "environment: variables, folder, limits, signals": """
import ctypes, os, resource, signal, sys
os.environ['PYTHONPATH'] = '/tmp'
ctypes.CDLL(None).setenv(b'LD_PRELOAD', b'/tmp/x.so', 1)
os.umask(0)
sys.setrecursionlimit(50)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM):
    signal.signal(number, signal.SIG_IGN)
signal.setitimer(signal.ITIMER_REAL, 0.05)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_STACK, resource.RLIMIT_CPU):
    resource.setrlimit(limit, (1, 1))
try:
    os.chdir('/tmp')
except OSError:
    pass
""",
    "finders: hooks, modules and built-ins": """
import builtins, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None): raise ImportError('mine')
sys.meta_path.insert(0, Finder)
sys.path.insert(0, '/tmp')
sys.path_hooks.append(lambda path: Finder)
for name in list(sys.modules):
    if name.startswith(('rewards.', 'json', 'random')):
        sys.modules[name] = None
builtins.all = builtins.len = lambda *values: True
builtins.__import__ = None
""",
    "processes: threads that go on, and a stop": """
import os, signal, threading, time
def late():
    while True:
        for number in (3, 4, 5):
            try: os.write(number, b'\\x0e\\0\\0\\0["ok",5,[],[]]')
            except OSError: pass
        time.sleep(0.01)
threading.Thread(target=late, daemon=True).start()
def add(a, b):
    os.kill(os.getpid(), signal.SIGSTOP)
""",
}

# What a program may hold while others run: kernels count it by user, and zygotes may share one.
HOLDINGS: dict[str, str] = {
    "descriptors in flight": """
import _socket, struct, time
near, far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
near.sendmsg([b"x"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", 0) * 253)])
time.sleep(600)
""",
    "threads without end": """
import _thread, time
_thread.stack_size(32768)
while True:
    try:
        _thread.start_new_thread(time.sleep, (600,))
    except RuntimeError:
        time.sleep(0.001)
""",
}

SNAPSHOT = """
import atexit, builtins, fcntl, os, resource, signal, sys, zlib
def flags(number):
    try:
        return fcntl.fcntl(number, fcntl.F_GETFL), fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return None
print(sorted(os.environ.items()), sys.path, sys.path_hooks, sys.flags, sys.getrecursionlimit())
print([getattr(finder, '__name__', type(finder).__name__) for finder in sys.meta_path], sorted(sys.modules))
print(sorted(vars(builtins)), len.__module__, os.getcwd(), os.umask(0o77))
print([flags(number) for number in range(72)])
print([resource.getrlimit(limit) for limit in range(16)])
print([str(signal.getsignal(number)) for number in range(1, 65)], signal.pthread_sigmask(0, ()))
print(signal.getitimer(signal.ITIMER_REAL), os.getppid(), os.getuid(), os.getpgrp())
for finder in sys.meta_path:
    if hasattr(finder, '_archive'):
        print(zlib.crc32(finder._archive), zlib.crc32(repr(finder._index).encode()))
for folder in ('/tmp', '/dev/shm', '/var/tmp', '/'):
    for name in ('json.py', 'sitecustomize.py', 'PWNED_leftover'):
        print(os.path.exists(os.path.join(folder, name)))
"""
