"""Labels against masks. The package can be called: ``cellseg_deploy.evaluate(...)`` is ``api.evaluate``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Evaluate(ModuleType):
    """Whoever imports a module of this room puts the room in the place of a function of its name."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from cellseg_deploy.evaluate.api import evaluate

        return evaluate(*arguments, **settings)


sys.modules[__name__].__class__ = _Evaluate
