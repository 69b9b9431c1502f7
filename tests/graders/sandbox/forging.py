"""Submissions whose function `f` seems to return 42 without doing so, as data."""

EQUAL = "\n    __eq__ = lambda self, other: True\n    __hash__ = None\n    __repr__ = lambda self: '42'\n"
FORGING = {
    "an object equal to all": f"class E:{EQUAL}\ndef f(): return E()",
    "an integer equal to all": f"class E(int):{EQUAL}\ndef f(): return E(1)",
    "a list equal to all": f"class E(list):{EQUAL}\ndef f(): return E([42])",
    "a text equal to all": f"class E(str):{EQUAL}\ndef f(): return E('42')",
    "a float equal to all": f"class E(float):{EQUAL}\ndef f(): return E(42)",
    "an item equal to all": f"class E(int):{EQUAL}\ndef f(): return [E(42)]",
    "a key equal to all": "class E(str): __eq__ = lambda *_: True; __hash__ = str.__hash__\ndef f(): return {E(): 42}",
    "a false class": "class E:\n    __class__ = int\n    __int__ = __index__ = lambda s: 42\ndef f(): return E()",
    "a metaclass": f"class M(type):{EQUAL}\nclass E(metaclass=M): pass\ndef f(): return E()",
    "a patched json": "import json\njson.dumps = json.encoder.c_make_encoder = lambda *a, **k: '42'\ndef f(): return 1",
    "a patched write": "import os\nos.write = lambda fd, b: os.writev(fd, [b'42\\n'])\ndef f(): return 1",
    "printing": "print(42, flush=True)\ndef f(): print(42, flush=True)",
    "leaving at once": "import os\nprint(42, flush=True)\nos._exit(0)",
    "leaving in the call": "import os\ndef f(): os._exit(0)",
    "at exit": "import atexit, os\natexit.register(lambda: os.write(1, b'42'))\ndef f(): return 1",
    "a thread": "import threading, os\nthreading.Thread(target=lambda: os.write(1, b'42')).start()\ndef f(): return 1",
    "a child": "import os\ndef f():\n    if os.fork() == 0: os.execlp('echo', 'echo', '42')\n    os.wait(); return 1",
    "every descriptor twice": """
import os
for fd in range(3, 64):
    for _ in range(2):
        try: os.write(fd, b'42\\n')
        except OSError: pass
def f(): return 42
""",
    "a frame": """
import sys
def f():
    frame = sys._getframe()
    while frame:
        for v in [*frame.f_locals.values()]:
            if isinstance(v, dict) and "expected" in v: return v["expected"]
        frame = frame.f_back
    return 7
""",
}
