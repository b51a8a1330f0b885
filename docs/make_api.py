"""Writes api.md: every public name with its signature and docstring. python docs/make_api.py"""

import enum
import inspect
import pathlib
import re

import dsv4_jax

HERE = pathlib.Path(__file__).resolve().parent
HEAD = """# Every public name

What `import dsv4_jax` offers, by theme, from the docstrings (`python docs/make_api.py`). T is the number of tokens of
a step, S of the requests it serves, R of slots; shapes are in parentheses.
"""


def themes() -> dict[str, list[str]]:
    """The names by theme, as the package's table of contents has them."""
    source = pathlib.Path(dsv4_jax.__file__).read_text()
    table = source[source.index("_MODULES = {") :].partition("\n}")[0]
    found: dict[str, list[str]] = {}
    for comment, name in re.findall(r'^    (?:# (.+)|"(\w+)": .*)$', table, re.MULTILINE):
        if comment:
            found[comment.rstrip(".")] = names = []
        else:
            names.append(name)
    return found


def signature(thing) -> str:
    """The parameters without annotations, which the docstring gives in words."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    plain = [p.replace(annotation=p.empty) for p in parameters if p.name not in ("self", "cls")]
    return str(inspect.Signature(plain)).replace("<factory>", "…")


def text(thing) -> str:
    """The docstring; what looks like a heading of Google's style becomes bold."""
    doc = inspect.getdoc(thing) or ""
    doc = re.sub(r"^(Args|Attributes|Returns|Raises|Yields|Example):$", r"**\1**", doc, flags=re.MULTILINE)
    return re.sub(r"^ {2,4}(\*{0,2}\w+(?:, \w+)*): ", r"- `\1`: ", doc, flags=re.MULTILINE)


def members(cls) -> list[tuple[str, object]]:
    """Public methods and properties that the class itself or a base of this package defines, in order."""
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("dsv4_jax"):
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    kinds = (property, classmethod, staticmethod)
    return [(name, value) for name, value in found.items() if isinstance(value, kinds) or inspect.isfunction(value)]


def entry(name: str) -> str:
    """One name, with the methods of a class."""
    thing = getattr(dsv4_jax, name)
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):  # its signature is another in every Python
        return f"### {name}\n\nOne of {', '.join(f'`{value.value}`' for value in thing)}.\n\n{text(thing)}\n"
    parts = [f"### {name}\n", f"`{name}{signature(thing)}`\n", text(thing) + "\n"]
    if inspect.isclass(thing):
        made = vars(thing).get("__init__")
        if made is not None and made.__doc__:
            parts.append(text(made) + "\n")
        for method, value in members(thing):
            if method.startswith("tree_"):
                continue
            inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            shown = method if isinstance(value, property) else method + signature(inner)
            parts.append(f"#### `{name}.{shown}`\n\n{text(inner)}\n")
    return "\n".join(parts)


def page() -> str:
    """The whole page."""
    sections = [f"## {theme}\n\n" + "\n".join(map(entry, names)) for theme, names in themes().items()]
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    (HERE / "api.md").write_text(page())
