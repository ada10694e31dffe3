"""Of each scorer the reference that it follows; one module per family.

`CASES` of a module holds them by the scorer's name, `WITHOUT` says why there is none.
"""

import importlib
import pkgutil

from tests.compress.scores.cases import Case

_MODULES = [
    importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
]
REFERENCES: dict[str, list[Case]] = {}
WITHOUT_REFERENCE: dict[str, str] = {}
for _module in _MODULES:
    REFERENCES |= getattr(_module, "CASES", {})
    WITHOUT_REFERENCE |= getattr(_module, "WITHOUT", {})
