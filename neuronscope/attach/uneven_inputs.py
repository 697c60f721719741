"""Tell whether a model is trained in torch's ``Join``, where ranks may run out of data at different steps.

There a rank that has no data left repeats the collectives of ``DistributedDataParallel`` until no rank has any left,
and does nothing else. A rank that waited for it inside the training loop would wait for ever.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

__all__ = ["UnevenInputs"]


class UnevenInputs:
    """Whether ``Join`` is used with a model, or with the ``DistributedDataParallel`` around it.

    Args:
        model: The watched model. It is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = self._wrapper = weakref.ref(model)

    def note_wrapper(self) -> None:
        """Note the ``DistributedDataParallel`` whose forward is running, if there is one."""
        wrapper: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None:
            self._wrapper = weakref.ref(wrapper)

    @property
    def expected(self) -> bool:
        """True from the time when ``Join`` was first used with the model."""
        models = [model for model in (self._model(), self._wrapper()) if model is not None]
        return any(_uses_join(module) for model in models for module in model.modules())


def _uses_join(module: nn.Module) -> bool:
    """Return True if ``Join`` configured this module; torch has no public way to ask, and keeps the answer for good."""
    return getattr(vars(module).get("_join_config"), "enable", False)
