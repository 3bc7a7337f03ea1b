"""Collect the messages of all errors that a user can meet, as a page of the site; `python docs/errors.py` prints it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("launch", "configs", "framework", "models", "optimizers", "benchmarks")
# ValueErrors of these folders reach the user of a config as one line.
WITH_VALUE_ERRORS = ("configs", "models", "optimizers")


def messages(path: Path) -> list[str]:
    """Return the messages of the errors that a module raises, with names of values in braces."""
    tree = ast.parse(path.read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    errors = {"UserError", "TrainingStopped"}
    if path.relative_to(ROOT).parts[0] in WITH_VALUE_ERRORS:
        errors.add("ValueError")
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        if ast.unparse(node.exc.func) in errors:
            message = node.exc.args[0]
            made = functions.get(ast.unparse(message.func)) if isinstance(message, ast.Call) else None
            texts = [x.value for x in ast.walk(made) if isinstance(x, ast.Return)] if made else [message]
            found += [" ".join(text(one).split()) for one in texts if one is not None]
    return [one for one in dict.fromkeys(found) if re.search(r"\w{3}.* ", re.sub(r"{.*?}", "", one))]


def text(node: ast.expr) -> str:
    """Return the text of an expression: literals as they are, values as names in braces."""
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=values):
            return "".join(map(text, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text(left) + text(right)
        case ast.IfExp(body=body, orelse=other):
            return text(body) or text(other)
        case ast.FormattedValue(value=ast.Constant() | ast.IfExp() as value):
            return text(value)
        case ast.Call(func=ast.Name(id="did_you_mean")):
            return ". Did you mean {name}?"
        case ast.FormattedValue(value=value):
            return text(value)
    return "{" + name(node) + "}"


def name(node: ast.expr) -> str:
    """Return a short name for the value of an expression."""
    match node:
        case ast.Name(id=found) | ast.Attribute(attr=found):
            return found.strip("_")
        case ast.Call(func=ast.Attribute(value=value, attr="join")) | ast.Call(args=[value, *_]):
            return name(node.args[0] if node.args else value)
        case ast.Call(func=function):
            return name(function)
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return name(value)
        case ast.GeneratorExp(generators=[first, *_]):
            return name(first.iter)
    return "..."


def by_room() -> Iterator[tuple[str, list[str]]]:
    """Yield each folder that raises errors, and their messages."""
    rooms: dict[str, list[str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).parts[:-1]
            rooms.setdefault("/".join(parts[:2]), []).extend(messages(path))
    yield from ((room, found) for room, found in rooms.items() if found)


def page() -> str:
    """Return the page: a table of messages and fixes for each folder."""
    lines = ["# Error messages", ""]
    lines += ["Every message of the source, by folder. Names in braces stand for values. Search for your words."]
    for room, found in by_room():
        lines += ["", f"## {room}", "", "| message | what to do |", "|---|---|"]
        lines += ["| {} | {} |".format(*map(cell, halves(message))) for message in sorted(found, key=str.lower)]
    return "\n".join(lines) + "\n"


def halves(message: str) -> tuple[str, str]:
    """Return the problem and the fix: the last sentence, which begins with a verb."""
    parts = re.split(r"(?<!e\.g)[.;:] (?=[A-Za-z`'{])", message)
    if len(parts) == 1:
        return message, "the line that quotes it says so"
    return message[: -len(parts[-1])].rstrip(), parts[-1]


def cell(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


if __name__ == "__main__":
    print(page())
