"""The tests are at least as long as what they test."""

import ast
import io
import tokenize

from tests.unit.source import PACKAGE, ROOT

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SPACE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text):
    """Lines that hold code: no blank ones, no comments, no docstrings."""
    docs, code = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SPACE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


def total(folder):
    return sum(code_lines(path.read_text()) for path in folder.rglob("*.py"))


def test_code_is_counted_without_words():
    """A docstring, a comment and a blank line are none."""
    assert code_lines('"""Doc."""\n\n# why\nx = [\n    1,\n]\n') == 3


def test_there_is_as_much_test_as_source():
    """In lines of code; the ratio may only grow."""
    assert total(ROOT / "tests") >= total(PACKAGE)
