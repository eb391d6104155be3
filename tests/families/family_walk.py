"""Every causal language model class of the installed ``transformers``, found by walking the library.

Two places are looked at, so that a class which stands in only one of them is found as well: the mapping of
``AutoModelForCausalLM``, and the source of every model directory, for classes named ``*ForCausalLM``.
"""

import importlib
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MAPPED

_MODELS = Path(transformers.__file__).parent / "models"
# Not a model.
_FACTORY = "AutoModelForCausalLM"


class Family(NamedTuple):
    """One class of ``transformers`` that predicts the next token.

    Attributes:
        name: directory below ``transformers.models``; the class's name follows it where a directory has several.
        module: the module that defines the class.
        class_name: the class.
    """

    name: str
    module: str
    class_name: str

    def load(self) -> type:
        """The class itself; imports its module."""
        return getattr(importlib.import_module(self.module), self.class_name)


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    """All families, ordered by name; no model module is imported."""
    defined: dict[str, tuple[str, str]] = {}
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE):
            defined.setdefault(name, (path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}"))
    mapped = {name for names in MAPPED.values() for name in ((names,) if isinstance(names, str) else names)}
    found = mapped | {name for name in defined if name.endswith("ForCausalLM") and name != _FACTORY}
    directories = [defined[name][0] for name in found]
    named = []
    for name in found:
        directory, module = defined[name]
        named.append(Family(directory if directories.count(directory) == 1 else f"{directory} {name}", module, name))
    return tuple(sorted(named))
