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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_MODELS = Path(transformers.__file__).parent / "models"
_CLASS = re.compile(r"^class (\w*ForCausalLM)\(", re.MULTILINE)
# Not models: the factory, and the mapping's classes are named here by the module that defines them.
_FACTORIES = {"AutoModelForCausalLM"}


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
    found: dict[str, tuple[str, str]] = {}
    defined: dict[str, tuple[str, str]] = {}
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        text, place = path.read_text(), (path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}")
        for name in re.findall(r"^class (\w+)\(", text, re.MULTILINE):
            defined.setdefault(name, place)
        for name in _CLASS.findall(text):
            if name not in _FACTORIES:
                found[name] = place
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        for name in (names,) if isinstance(names, str) else names:
            found[name] = defined[name]
    directories = [directory for directory, _ in found.values()]
    named = [
        Family(directory if directories.count(directory) == 1 else f"{directory} {name}", module, name)
        for name, (directory, module) in found.items()
    ]
    return tuple(sorted(named))
