"""Score labels against masks. The package is callable: ``cellseg_deploy.evaluate(...)`` is ``api.evaluate``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Evaluate(ModuleType):
    """A callable package: importing one of its modules rebinds the name of the function to the package."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from cellseg_deploy.evaluate.api import evaluate

        return evaluate(*arguments, **settings)


sys.modules[__name__].__class__ = _Evaluate
