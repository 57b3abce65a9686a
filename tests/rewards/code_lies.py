"""More hostile programs, against tests of `add`: values that are not what they seem, the machinery around the
answer, and ways out of the process. Each must get 0. And honest programs that look unusual.
"""

from __future__ import annotations

LIES: dict[str, str] = {
    "__class__ override": """class X:
    __class__=int
    def __eq__(s,o): return True
def add(a,b): return X()
""",
    "__class__ property int": """class X(int):
    @property
    def __class__(self): return int
    def __eq__(s,o): return True
    __hash__=int.__hash__
def add(a,b): return X(0)
""",
    "atexit zero": """def add(a,b): return 0
import atexit,os
atexit.register(os._exit,0)
""",
    "monkeypatch json decoder": """def add(a,b): return 0
import json
json.JSONDecoder.decode=lambda *a: ['ok',5,[],[]]
json.loads=lambda *a: ['ok',5,[],[]]
""",
    "patch server module": """def add(a,b): return 0
import sys
m=sys.modules.get('rewards.code.solution')
if m: m.Server._reply=lambda self,result,*a: ['ok',5,[],[]]
""",
    "builtins print open": """def add(a,b): return 0
import builtins
builtins.print=lambda *a,**k: None
builtins.open=None
builtins.AssertionError=Exception
""",
    "thread writes forged frames forever": """def add(a,b): return 0
import threading,os
def t():
    b=b'["ok",5,[],[]]'
    while True:
        try: os.write(4,len(b).to_bytes(4,'little')+b)
        except OSError: return
threading.Thread(target=t,daemon=True).start()
""",
    "recursion bomb repr": """class R:
    def __repr__(s): return repr(s)
def add(a,b): return R()
""",
    "hash collision dos": """def add(a,b):
    return {i*(2**61-1):0 for i in range(20000)}
""",
    "hash collision str in set": """def add(a,b):
    return set(i*(2**61-1) for i in range(20000))
""",
    "deep dict": """def add(a,b):
    d={}
    for i in range(5000): d={'a':d}
    return d
""",
    "huge frame": """def add(a,b): return [0]*10_000_000
""",
    "huge ints many": """def add(a,b): return [1<<100000]*500
""",
    "decimal bomb": """from decimal import Decimal
def add(a,b): return Decimal('1e999999')
""",
    "fraction bomb": """from fractions import Fraction
def add(a,b): return Fraction(1, 10**5000)
""",
    "env var": """import os
os.environ['PYTHONINSPECT']='1'
def add(a,b): return 0
""",
    "sitecustomize": """import sys
sys.path.insert(0,'/tmp')
try: open('/tmp/PWNED_sitecustomize.py','w').write('x')
except OSError: pass
def add(a,b): return 0
""",
    "shm_open": """import ctypes
l=ctypes.CDLL(None)
fd=l.shm_open(b'/PWNED_x',66,0o666)
if fd>=0: add=lambda a,b:a+b
else: add=lambda a,b:0
""",
    "posix mq": """import ctypes
l=ctypes.CDLL(None)
r=l.syscall(240,b'PWNED',66,0o666,0)
add=(lambda a,b:a+b) if r>=0 else (lambda a,b:0)
""",
    "memfd_create exec": """import os
try:
    fd=os.memfd_create('x')
    os.execve(fd,['x'],{})
except Exception: pass
def add(a,b): return 0
""",
    "inotify": """import ctypes
l=ctypes.CDLL(None)
r=l.inotify_init1(0)
add=(lambda a,b:a+b) if r>=0 else (lambda a,b:0)
""",
    "pidfd_open parent": """import os
try:
    os.pidfd_open(os.getppid()); add=lambda a,b:a+b
except (OSError,AttributeError): add=lambda a,b:0
""",
    "process_vm_readv": """import ctypes,os
l=ctypes.CDLL(None)
r=l.syscall(310,os.getppid(),0,0,0,0,0)
add=(lambda a,b:a+b) if r>=0 else (lambda a,b:0)
""",
    "sched_setaffinity others": """import os
try:
    os.sched_setaffinity(os.getppid(),{0}); add=lambda a,b:a+b
except OSError: add=lambda a,b:0
""",
    "setpriority parent": """import os
try:
    os.setpriority(os.PRIO_PROCESS,os.getppid(),19); add=lambda a,b:a+b
except OSError: add=lambda a,b:0
""",
    "prlimit parent": """import resource,os
try:
    resource.prlimit(os.getppid(),resource.RLIMIT_CPU,(1,1)); add=lambda a,b:a+b
except (OSError,PermissionError): add=lambda a,b:0
""",
    "setuid 0": """import os
try:
    os.setuid(0); add=lambda a,b:a+b
except OSError: add=lambda a,b:0
""",
    "chroot mount": """import ctypes
l=ctypes.CDLL(None)
r=min(l.mount(b'a',b'/tmp',b'tmpfs',0,0), l.chroot(b'/'), l.unshare(0x10000000))
add=(lambda a,b:a+b) if r>=0 else (lambda a,b:0)
""",
    "read test file by listing proc fd": """import os
out=''
try:
    out=str(os.listdir('/proc/self/fd'))
except OSError: pass
add=(lambda a,b:a+b) if out else (lambda a,b:0)
""",
    "tkill": """import ctypes,os
l=ctypes.CDLL(None)
r=l.syscall(200,os.getppid(),19)
add=(lambda a,b:a+b) if r==0 else (lambda a,b:0)
""",
    "rt_sigqueueinfo": """import ctypes,os
l=ctypes.CDLL(None)
r=l.syscall(129,os.getppid(),9,0)
add=(lambda a,b:a+b) if r==0 else (lambda a,b:0)
""",
    "clone3": """import ctypes
l=ctypes.CDLL(None)
buf=(ctypes.c_uint64*11)()
r=l.syscall(435,buf,88)
if r==0:
    while True: pass
add=(lambda a,b:a+b) if r>0 else (lambda a,b:0)
""",
    "vfork": """import ctypes
l=ctypes.CDLL(None)
r=l.syscall(58)
if r==0: l._exit(0)
add=(lambda a,b:a+b) if r>0 else (lambda a,b:0)
""",
}

UNUSUAL: dict[str, str] = {
    "class callable": """class Add:
    def __call__(self,a,b): return a+b
add=Add()
""",
    "functools partial": """from functools import partial
import operator
add=partial(operator.add)
""",
    "recursion limit": """import sys
sys.setrecursionlimit(10**6)
def add(a,b): return a if b==0 else (add(a+1,b-1) if b>0 else add(a-1,b+1))
def deep(n): return 0 if n==0 else 1+deep(n-1)
assert deep(20000)==20000
""",
    "deep recursion 50k in thread": """import sys,threading
sys.setrecursionlimit(10**6)
threading.stack_size(256*1024*1024)
out=[]
def deep(n): return 0 if n==0 else 1+deep(n-1)
t=threading.Thread(target=lambda: out.append(deep(50000)))
t.start(); t.join()
assert out==[50000]
def add(a,b): return a+b
""",
    "prints a lot 1MB": """def add(a,b):
    print('x'*300000)
    return a+b
""",
    "type hints": """from __future__ import annotations
from typing import Optional
def add(a: int, b: Optional[int]=0) -> int: return a+b
""",
    "walrus/async": """import asyncio
async def g(a,b): return a+b
def add(a,b): return asyncio.run(g(a,b))
""",
}
