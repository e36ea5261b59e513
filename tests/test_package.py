"""The house rules: short files and functions, plain ASCII, and no setting that nobody reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import longspan
from longspan.settings import Settings
from longspan.trainer.settings import RunSettings

ROOT = Path(longspan.__file__).parent
FLOORS = ("cluster", "recipes", "trainer", "attention", "parallel", "kernels")
ATTENTION = ROOT / "attention"
COUNTING = ("cost", "pairs", "parameters", "catalogue")
FILE_LINES = 400
FUNCTION_LINES = 50


def sources() -> list[Path]:
    """All files of the package."""
    folders = [file for floor in FLOORS for file in (ROOT / floor).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *folders])


def every_source() -> list[Path]:
    """The package, its tests and its benchmarks: one length for all."""
    return [*sources(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]


def long_parts(text: str) -> Iterator[str]:
    """Functions of more than `FUNCTION_LINES` lines, their docstrings not counted.

    Nor the arguments of a Triton kernel: it can take no object that holds them.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            about = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            kinds = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(kind.startswith("triton.jit") for kind in kinds):
                about += node.body[0].lineno - node.lineno
            if node.end_lineno - node.lineno + 1 - about > FUNCTION_LINES:
                yield node.name


def settings_blocks(block: type[Settings]) -> set[type[Settings]]:
    """A settings class and all that its fields hold."""
    found, waiting = set(), [block]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, Settings):
            if kind not in found:
                found.add(kind)
                waiting += [field.annotation for field in kind.model_fields.values()]
        else:
            waiting += getattr(kind, "__args__", ())
    return found


def unread(fields: set[str], texts: list[str]) -> set[str]:
    """The names that occur as an attribute in none of the sources."""
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    return fields - {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_files_are_short():
    assert len(sources()) > 30
    lines = {str(file): len(file.read_text("utf-8").splitlines()) for file in every_source()}
    assert {file: count for file, count in lines.items() if count > FILE_LINES} == {}


def test_functions_are_short():
    found = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in every_source()
        for name in long_parts(file.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)
    assert [*long_parts("def f():\n" + "    x = 1\n" * 50)] == ["f"]
    assert [*long_parts('def f():\n    """About."""\n' + "    x = 1\n" * 49)] == []


def test_sources_are_ascii():
    found = [str(file) for file in sources() if not file.read_bytes().isascii()]
    assert not found, "\n".join(found)


def test_every_setting_is_read():
    blocks = settings_blocks(RunSettings)
    assert len(blocks) > 12
    # Checking a setting is not obeying it; the settings' own properties count.
    readers = [file for file in sources() if file.parent.name != "recipes"]
    readers = [file for file in readers if not file.name.endswith("settings.py")]
    # Nor is counting what a setting costs, or telling of it.
    readers = [file for file in readers if file.stem not in COUNTING or file.parent != ATTENTION]
    readers += [ROOT / "trainer" / "settings.py", ATTENTION / "layer_settings.py"]
    texts = [file.read_text("utf-8") for file in readers]
    fields = {name for block in blocks for name in block.model_fields}
    # A preset is read before it is a field: it fills in the others.
    assert unread(fields, texts) == {"preset"}
    assert unread({"lr", "no_such_setting"}, texts) == {"no_such_setting"}
