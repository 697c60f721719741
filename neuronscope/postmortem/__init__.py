"""Post-mortem: what a checkpoint says of the neurons of the network that it holds, with as much proof as there is.

The package is called like the function ``neuronscope.postmortem(...)``, and importing a part of it binds it to that
name. So it can be called itself, and is the function, whatever was imported first.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :func:`neuronscope.postmortem.inquest.postmortem`."""
        from neuronscope.postmortem.inquest import postmortem  # loads torch

        return postmortem(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
