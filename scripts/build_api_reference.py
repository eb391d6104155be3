"""Writes docs/api.md, the reference of the public names, from their signatures and docstrings.

python scripts/build_api_reference.py          writes the page
python scripts/build_api_reference.py --check  exits with 1 where the committed page is not what would be written
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
COMMAND = "python scripts/build_api_reference.py"
# What examples and documentation import. A package counts with its __all__, a module with its public names.
MODULES = (
    *("nc_patch", "nc_patch.selections", "nc_patch.budget", "nc_patch.cli"),
    *("eval_tasks.models", "eval_tasks.texts", "eval_tasks.tasks", "eval_tasks.measure", "eval_tasks.answers"),
    *("eval_tasks.methods", "eval_tasks.matching", "eval_tasks.synthetic", "eval_tasks.metrics", "eval_tasks.sweep"),
    *("eval_tasks.run", "eval_tasks.store", "eval_tasks.report", "eval_tasks.command", "eval_tasks.errors"),
)


def main(argv: list[str]) -> int:
    """Writes or, with ``--check``, checks the page; returns the exit code."""
    wanted = page()
    if argv != ["--check"]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != wanted:
        print(f"{PAGE.name} is out of date; run: {COMMAND}", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    """The whole page."""
    made = f"Made from the docstrings by `{COMMAND}`. B batch, Hq query heads, Hkv key/value heads, Lq query length,"
    parts = [f"# API reference\n\n{made}\nLk key length, D head dimension; tensors are `[B, H, L, D]`.\n"]
    seen: list[Any] = []
    for module in MODULES:
        parts.append(f"## {module}\n\n{_markdown(import_module(module).__doc__)}")
        for name, what in public_names(module):
            if what not in seen:
                path = Path(inspect.getfile(inspect.unwrap(what))).relative_to(ROOT)
                parts.append(f"### {name} ([{path}](../{path}))\n\n{_described(name, what)}")
                parts += [f"#### {member}\n\n{_described(member, each)}" for member, each in public_members(name, what)]
                seen.append(what)
    return "\n".join(parts)


def public_names(module: str) -> list[tuple[str, Any]]:
    """The public functions and classes of a module: its ``__all__``, else what it defines without leading ``_``."""
    loaded = import_module(module)
    own = [name for name, each in vars(loaded).items() if getattr(each, "__module__", "") == module and name[0] != "_"]
    found = [(name, getattr(loaded, name)) for name in getattr(loaded, "__all__", own)]
    return [(name, what) for name, what in found if inspect.isclass(what) or inspect.isfunction(inspect.unwrap(what))]


def public_members(name: str, what: Any) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, but for those that a class of this repository describes for it."""
    ours = [base for base in getattr(what, "__mro__", ())[1:] if base.__module__.startswith(("nc_patch", "eval_tasks"))]
    for member, each in vars(what).items() if inspect.isclass(what) else ():
        if member[0] != "_" and inspect.isfunction(_function(each)) and not any(hasattr(base, member) for base in ours):
            yield f"{name}.{member}", each


def signature(name: str, what: Any) -> str:
    """The signature, without the modules of its types; one parameter a line where it is long."""
    if inspect.isclass(what) and issubclass(what, Exception):
        return f"class {name}({what.__base__.__name__})"
    found = inspect.signature(_function(what))
    parameters = list(found.parameters.values())
    if dataclasses.is_dataclass(what):
        # One with an __init__ of its own takes its fields, and others by keyword.
        others = [each for each in parameters if each.kind == each.VAR_KEYWORD]
        parameters = [_parameter(field) for field in dataclasses.fields(what) if field.name[0] != "_"] + others
    elif "." in name and not isinstance(what, staticmethod):
        parameters = parameters[1:]
    returns = found.empty if inspect.isclass(what) else found.return_annotation
    text = f"{name}{found.replace(parameters=parameters, return_annotation=returns)}"
    # Without quotes around types that are defined later, modules, and what Python says of an object beside its name.
    text = re.sub(r"(-> |: )'([^']*)'", r"\1\2", text).replace("= Ellipsis", "= ...")
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])|~|<function | at 0x\w+>|<class |'>", "", text)
    if isinstance(what, property | cached_property):
        return text.replace("() ->", ":")
    text = "class " * inspect.isclass(what) + "@classmethod\n" * isinstance(what, classmethod) + text
    if len(text) <= 100:
        return text
    head, inner, tail = re.fullmatch(r"(.*?)\((.*)\)(.*)", text, re.S).groups()
    return f"{head}(\n    " + re.sub(r", (?=\*{0,2}\w+: |\*, )", ",\n    ", inner) + f",\n){tail}"


def _parameter(field: Any) -> Parameter:
    kind = Parameter.KEYWORD_ONLY if field.kw_only else Parameter.POSITIONAL_OR_KEYWORD
    made = Parameter.empty if field.default_factory is dataclasses.MISSING else ...
    default = made if field.default is dataclasses.MISSING else field.default
    return Parameter(field.name, kind, default=default, annotation=field.type)


def _function(member: Any) -> Any:
    """What a property or a class method is made of; anything else as it is."""
    wrapping = [name for name in ("fget", "func", "__func__") if hasattr(member, name)]
    return getattr(member, wrapping[0]) if wrapping else member


def _described(name: str, what: Any) -> str:
    return f"```python\n{signature(name, what)}\n```\n\n{_markdown(_function(what).__doc__)}"


def _markdown(docstring: str | None) -> str:
    """A docstring in Markdown: its sections become headed lists, its double backticks single ones."""
    titles = r"^(Args|Attributes|Returns|Raises|Yields):\n"
    text, *sections = re.split(titles, inspect.cleandoc(docstring or ""), flags=re.M)
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title not in ("Returns", "Yields"):
            body = re.sub(r"^ {4}(?=\S)([^:\n]+):", r"- `\1`:", body, flags=re.M)
            body = re.sub(r"^ {8}", "  ", body, flags=re.M)
        text += f"*{title}*\n\n" + re.sub(r"^ {4}", "", body, flags=re.M)
    return text.replace("``", "`").strip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
