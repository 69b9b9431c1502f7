"""Sandbox backends, in the order in which they are tried."""

from sdzero.graders.sandbox.backends.bubblewrap import Bubblewrap
from sdzero.graders.sandbox.backends.nsjail import Nsjail
from sdzero.graders.sandbox.backends.sandlock import Sandlock
from sdzero.graders.sandbox.backends.unsafe import Unsafe

SANDBOXES = (Bubblewrap, Nsjail, Sandlock)
BACKENDS = {backend.name: backend for backend in (*SANDBOXES, Unsafe)}

__all__ = ["BACKENDS", "SANDBOXES", "Bubblewrap", "Nsjail", "Sandlock", "Unsafe"]
