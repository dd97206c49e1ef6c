"""One door to torch's own tests of a registered op."""

from __future__ import annotations

from torch import library

# schema, fake form, autograd registration and tracing of one call
opcheck = library.opcheck
