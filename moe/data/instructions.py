"""Real conversations that need no download: functions of the standard library, and small talk.

`code`: for each function of the running Python's standard library whose docstring is longer than 80 characters, the
request is its name and docstring, the response its source without the docstring. `talk`: the English conversations of
the `chatterbot-corpus` package (BSD), where it is installed.
"""

import ast
import importlib.util
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe.data.sources import default_sources, read
from moe.errors import DataError

MIN_DOCSTRING = 80  # characters; shorter ones seldom say enough to write the function from
# A conversation's name, and its messages.
Named = tuple[str, list[dict[str, str]]]


@lru_cache(maxsize=1)
def standard_library() -> tuple[Named, ...]:
    """(name, messages) of each documented function, in the order of the files; the name is FILE:FUNCTION#LINE."""
    return tuple(_functions())


def _functions() -> Iterator[Named]:
    sources, _ = default_sources()
    code = next(source for source in sources if source.name == "code")
    for document in read(code):
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):  # a template, or code of another Python
            continue
        lines = document.text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                pair = _pair(node, lines)
                if pair is not None:
                    yield f"{document.name}:{node.name}#{node.lineno}", pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> list[dict[str, str]] | None:
    """Request and response for one function, or None where its docstring is short or all that it has."""
    docstring = ast.get_docstring(node)
    if docstring is None or len(docstring) <= MIN_DOCSTRING or len(node.body) < 2:
        return None
    said = node.body[0]
    assert said.end_lineno is not None
    assert node.end_lineno is not None
    if said.lineno == node.lineno or node.body[1].lineno == said.end_lineno:  # on one line with other code
        return None
    source = lines[node.lineno - 1 : said.lineno - 1] + lines[said.end_lineno : node.end_lineno]
    response = textwrap.dedent("".join(source)).strip()
    try:
        ast.parse(response)
    except SyntaxError:  # a string inside it begins at the margin, so that the rest cannot be moved there
        return None
    request = f"Write the Python function {node.name}.\n\n{docstring}"
    return [
        {"role": "user", "content": request},
        {"role": "assistant", "content": response},
    ]


def small_talk() -> Iterator[Named] | None:
    """(name, messages) of each English conversation of chatterbot-corpus; None where it is not installed.

    Raises:
        ImportError: PyYAML, which reads its files, is missing; at once.
        DataError: a file is not what the package is known for.
    """
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        return None
    try:
        import yaml  # noqa: F401
    except ImportError:
        raise ImportError('reading chatterbot-corpus needs PyYAML: pip install "gpt4-moe[data]"') from None
    return _small_talk(Path(spec.origin).parent / "data" / "english")


def _small_talk(folder: Path) -> Iterator[Named]:
    import yaml

    for file in sorted(folder.glob("*.yml")):
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("conversations"), list):
            raise DataError(f"{file} has no list of conversations: reinstall chatterbot-corpus")
        for i, turns in enumerate(content["conversations"]):
            texts = [" ".join(str(turn).split()) for turn in turns]
            if len(texts) < 2 or not all(texts):
                continue
            roles = ("user", "assistant")
            messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
            yield f"{file.name}#{i}", messages
