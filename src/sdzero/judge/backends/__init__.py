"""Kinds of sandbox, in the order in which they are tried."""

from sdzero.judge.backends.bubblewrap import Bubblewrap
from sdzero.judge.backends.nsjail import Nsjail
from sdzero.judge.backends.sandlock import Sandlock
from sdzero.judge.backends.unsafe import Unsafe

SANDBOXES = (Bubblewrap, Nsjail, Sandlock)
BACKENDS = {backend.name: backend for backend in (*SANDBOXES, Unsafe)}

__all__ = ["BACKENDS", "SANDBOXES", "Bubblewrap", "Nsjail", "Sandlock", "Unsafe"]
