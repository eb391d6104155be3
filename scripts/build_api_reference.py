"""Writes docs/api.md, the reference of the public names, from their signatures and docstrings.

python scripts/build_api_reference.py          writes the page
python scripts/build_api_reference.py --check  exits with 1 where the committed page is not what would be written

It reads the source and imports none of it, so that the page does not depend on the versions that are installed.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
COMMAND = "python scripts/build_api_reference.py"
# What examples and documentation import. A package counts with its __all__, a module with its public names.
MODULES = (
    "nc_patch",
    "nc_patch.selections",
    "nc_patch.budget",
    "nc_patch.cli",
    "eval_tasks.models",
    "eval_tasks.texts",
    "eval_tasks.tasks",
    "eval_tasks.measure",
    "eval_tasks.answers",
    "eval_tasks.methods",
    "eval_tasks.matching",
    "eval_tasks.synthetic",
    "eval_tasks.metrics",
    "eval_tasks.sweep",
    "eval_tasks.run",
    "eval_tasks.store",
    "eval_tasks.report",
    "eval_tasks.command",
    "eval_tasks.errors",
)
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Public:
    """A public function or class: where it is defined, its node of the syntax tree, and the name in front of it.

    Attributes:
        module: the module that defines it.
        name: its name, with the class in front for a method.
        node: its definition.
    """

    module: str
    name: str
    node: Definition

    @property
    def docstring(self) -> str:
        """The docstring without indentation; empty where there is none."""
        return ast.get_docstring(self.node) or ""


def main(argv: list[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    wanted = page()
    if not parser.parse_args(argv).check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{PAGE.relative_to(ROOT)} is out of date; run: {COMMAND}", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page."""
    parts = [
        "# API reference\n\n"
        f"Made from the docstrings by `{COMMAND}`. B batch, Hq query heads, Hkv key/value heads, Lq query length,\n"
        "Lk key length, D head dimension; tensors are `[B, H, L, D]`.\n"
    ]
    seen: set[tuple[str, str]] = set()
    for module in MODULES:
        entries = [entry for entry in public_names(module) if (entry.module, entry.name) not in seen]
        seen |= {(entry.module, entry.name) for entry in entries}
        parts.append(f"## {module}\n\n{_markdown(_module_docstring(module))}")
        parts += [_entry(entry, level=3) for entry in entries]
    return "\n".join(parts)


def source_of(module: str) -> Path:
    """The file of a module or package of this repository."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_names(module: str) -> list[Public]:
    """The public functions and classes of a module: its ``__all__``, else what it defines without leading ``_``."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    defined = {node.name: node for node in tree.body if isinstance(node, Definition)}
    exported = _exported(tree)
    if exported is None:
        return [Public(module, name, node) for name, node in defined.items() if not name.startswith("_")]
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    found = []
    for name in exported:
        if name in defined:
            found.append(Public(module, name, defined[name]))
        elif name in imported:
            origin, original = imported[name]
            found += [entry for entry in _definitions(origin) if entry.name == original]
    return found


def public_members(entry: Public) -> Iterator[Public]:
    """The public methods and properties of a class, but for those that a class of this repository describes for it."""
    if not isinstance(entry.node, ast.ClassDef):
        return
    described = set(_inherited(entry))
    for node in entry.node.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in described:
            yield Public(entry.module, f"{entry.name}.{node.name}", node)


def _bases(entry: Public) -> Iterator[Public]:
    """The bases of a class and theirs, the first ones last, where those are imported from this repository."""
    bases = {ast.unparse(base) for base in entry.node.bases} if isinstance(entry.node, ast.ClassDef) else set()
    for node in ast.parse(source_of(entry.module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nc_patch"):
            for name in bases & {alias.name for alias in node.names}:
                for base in (found for found in _definitions(str(node.module)) if found.name == name):
                    yield base
                    yield from _bases(base)


def _inherited(entry: Public) -> Iterator[str]:
    """The names of the methods of its bases."""
    for base in _bases(entry):
        yield from (method.name for method in base.node.body if isinstance(method, ast.FunctionDef))


def _definitions(module: str) -> list[Public]:
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    return [Public(module, node.name, node) for node in tree.body if isinstance(node, Definition)]


def _exported(tree: ast.Module) -> list[str] | None:
    """What a module's ``__all__`` lists, or None where it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return None


def _module_docstring(module: str) -> str:
    return ast.get_docstring(ast.parse(source_of(module).read_text(encoding="utf-8"))) or ""


def _entry(entry: Public, level: int) -> str:
    path = source_of(entry.module).relative_to(ROOT)
    where = f" ([{path}](../{path}))" if level == 3 else ""
    text = f"{'#' * level} {entry.name}{where}\n\n```python\n{signature(entry)}\n```\n\n{_markdown(entry.docstring)}"
    return "\n".join([text, *(_entry(member, level + 1) for member in public_members(entry))])


def signature(entry: Public) -> str:
    """The signature as the source states it; one parameter a line where it is long."""
    node = entry.node
    name = entry.name
    if isinstance(node, ast.ClassDef):
        initial = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        parameters = _fields(node) if initial is None else _parameters(initial)[1:]
        if initial is not None and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            # It takes its fields, and others by keyword.
            parameters = _fields(node) + [each for each in parameters if each.startswith("**")]
        elif any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            inherited = [base.node for base in _bases(entry) if isinstance(base.node, ast.ClassDef)]
            parameters = [field for base in reversed(inherited) for field in _fields(base)] + parameters
        if any(ast.unparse(base).endswith("Error") for base in node.bases):
            return f"class {name}({ast.unparse(node.bases[0])})"
        return _call(f"class {name}", parameters, "")
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    parameters = _parameters(node)
    if "." in name and "staticmethod" not in decorators:
        parameters = parameters[1:]
    returns = f" -> {ast.unparse(node.returns).strip(chr(39))}" if node.returns is not None else ""
    if "property" in decorators:
        return f"{name}{returns.replace(' ->', ':', 1)}"
    marks = "".join(f"@{decorator}\n" for decorator in decorators if decorator in ("classmethod", "contextmanager"))
    return f"{marks}{_call(name, parameters, returns)}"


def _call(name: str, parameters: list[str], returns: str) -> str:
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) <= 100:
        return line
    inner = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"{name}(\n{inner}){returns}"


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The parameters of a function, each as the source states it, the marks ``/`` and ``*`` among them."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [_parameter(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg is not None:
        parts.append(f"*{_parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_parameter(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg is not None:
        parts.append(f"**{_parameter(arguments.kwarg, None)}")
    return parts


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    typed = f": {ast.unparse(argument.annotation)}" if argument.annotation is not None else ""
    assigned = "" if default is None else f" = {ast.unparse(default)}" if typed else f"={ast.unparse(default)}"
    return f"{argument.arg}{typed}{assigned}"


def _fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass or named tuple as the parameters that they are."""
    parts = []
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        kind = ast.unparse(field.annotation)
        if kind.endswith("KW_ONLY"):
            parts.append("*")
        elif not kind.startswith("ClassVar") and not field.target.id.startswith("_"):
            has_factory = isinstance(field.value, ast.Call) and ast.unparse(field.value.func).endswith("field")
            shown = "..." if has_factory else field.value and ast.unparse(field.value)
            parts.append(f"{field.target.id}: {kind}" + (f" = {shown}" if shown else ""))
    return parts


def _markdown(docstring: str) -> str:
    """A docstring in Markdown: its sections become headed lists, its double backticks single ones."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if indent == 0 and text.removesuffix(":") in _SECTIONS and text.endswith(":"):
            section = text.removesuffix(":")
            lines += [f"*{section}*", ""]
        elif text and indent == 0:
            section = ""
            lines.append(text)
        elif section in ("", "Returns", "Yields"):
            lines.append(text)
        elif text and indent == 4:
            name, colon, rest = text.partition(":")
            lines.append(f"- ``{name}``:{rest}" if colon else f"- {text}")
        else:
            lines.append(f"  {text}" if text else "")
    return "\n".join(lines).replace("``", "`").strip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(main())
