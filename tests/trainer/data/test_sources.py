import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from longspan.errors import DataError
from longspan.trainer.data import sources as module
from longspan.trainer.data.settings import DataSettings
from longspan.trainer.data.sources import (
    check_sources,
    fingerprint,
    read_documents,
    source_files,
    total_bytes,
)


def sources(*raw):
    return DataSettings.model_validate({"sources": raw}).sources


def source(kind, *paths, **more):
    extra = {"paths": [str(path) for path in paths]} if paths else {}
    return sources({"kind": kind, **extra, **more})


def texts(parts):
    return [document.text for document in read_documents(parts)]


def jsonl(*rows, field="text"):
    return "".join(json.dumps({field: row, "id": 1}) + "\n" for row in rows).encode()


def parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.table(rows), path, **options)
    return path


def test_text_files_folders_and_globs_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden", ".git/config", "sub/é.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name} é")
    assert texts(source("text", tmp_path / "b.txt")) == ["b.txt é"]
    all_four = ["a.txt é", "b.txt é", "sub/c.md é", "sub/é.txt é"]
    assert texts(source("text", tmp_path)) == all_four
    assert texts(source("text", tmp_path / "**/*.txt")) == [all_four[i] for i in (0, 1, 3)]
    # A file that two paths name is read once.
    assert texts(source("text", tmp_path / "b.txt", tmp_path / "[ab].txt")) == all_four[:2]


def test_paths_start_at_the_working_directory_and_home(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("a.txt", "./a.txt", "*.txt", "~/a.txt", "~/*.txt"):
        assert texts(source("text", path)) == ["text"]


def test_text_is_kept_as_it_is_but_for_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\x00\n")
    assert texts(source("text", tmp_path / "a.txt")) == ["one\r\ntwo\x00\n"]


def test_json_lines_plain_and_packed(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(jsonl("three", "", field="body") + b"\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl("one é", "two", field="body")))
    (tmp_path / "other.txt").write_text("not read")
    parts = source("jsonl", tmp_path, field="body")
    assert texts(parts) == ["one é", "two", "three", ""]
    origins = [document.origin for document in read_documents(parts)]
    assert origins[1] == f"{tmp_path}/a.jsonl.gz line 2"
    assert [d.bytes_read for d in read_documents(parts)][-1] <= total_bytes(parts)


def test_parquet_by_row_groups(tmp_path):
    rows = [f"row {i}" for i in range(500)]
    parquet(tmp_path / "a.parquet", {"id": range(500), "body": rows}, row_group_size=70)
    categories = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    large = pyarrow.array(["z"], pyarrow.large_string())
    parquet(tmp_path / "b.parquet", {"body": categories})
    parquet(tmp_path / "c.parquet", {"body": large})
    parts = source("parquet", tmp_path, field="body")
    assert texts(parts) == [*rows, "x", "y", "x", "z"]
    documents = list(read_documents(parts))
    assert documents[1].origin == f"{tmp_path}/a.parquet row 2"
    assert documents[-1].bytes_read == total_bytes(parts)


def test_the_standard_library():
    parts = source("python-stdlib")
    files = source_files(parts[0])
    names = {path.name for path in files}
    assert len(files) > 500 and {"argparse.py", "decimal.py", "typing.py"} <= names
    parents = {part for path in files for part in path.parts}
    assert not parents & {"site-packages", "test", "__pycache__"}
    assert os.__doc__ in "".join(texts(parts))
    assert check_sources(parts) == []


def test_all_sources_one_after_another(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_bytes(jsonl("two"))
    both = [
        {"kind": "jsonl", "paths": [str(tmp_path)]},
        {"kind": "text", "paths": [f"{tmp_path}/*.txt"]},
    ]
    documents = list(read_documents(sources(*both)))
    assert [document.text for document in documents] == ["two", "one"]
    assert [document.bytes_read for document in documents] == [25, 28]


BAD = {
    "missing file": ("text", "gone.txt", None, ["gone.txt does not exist", "working directory"]),
    "no match": ("text", "*.md", None, ["no file matches", "*.md", "correct the glob"]),
    "empty folder": ("jsonl", "", None, ["holds no *.jsonl or *.jsonl.gz files"]),
    "not UTF-8": ("text", "a.txt", b"ab\nc\xff\n", ["a.txt is not UTF-8", "byte 4", "convert it"]),
    "bad JSON": ("jsonl", "a.jsonl", b'{"text": "x"}\n{"te', ["a.jsonl line 2 is not valid JSON"]),
    "no object": ("jsonl", "a.jsonl", b"[1]\n", ["line 1 is a list, not an object"]),
    "JSON not UTF-8": ("jsonl", "a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl line 1 is not UTF-8"]),
    "missing field": (
        "jsonl",
        "a.jsonl",
        b'{"body": "x", "id": 1}\n',
        ["a.jsonl line 1 has no field 'text'; its fields: 'body', 'id'", "set `field`"],
    ),
    "null": ("jsonl", "a.jsonl", b'{"text": null}\n', ["line 1: field 'text' is null, not a str"]),
    "number": ("jsonl", "a.jsonl", b'{"text": 1.5}\n', ["'text' is a number, not a string"]),
    "surrogate": ("jsonl", "a.jsonl", b'{"text": "\\ud83d"}\n', ["half of a surrogate pair"]),
    "deep": ("jsonl", "a.jsonl", b'{"text": ' + b"[" * 10**5, ["line 1 is not valid JSON"]),
    "cut gzip": ("jsonl", "a.jsonl.gz", gzip.compress(jsonl("x") * 9)[:30], ["cannot read", ".gz"]),
    "no gzip": ("jsonl", "a.jsonl.gz", jsonl("x"), ["cannot read", "a.jsonl.gz", "Not a gzipped"]),
    "no Parquet": ("parquet", "a.parquet", b"x" * 99, ["a.parquet is not a readable Parquet file"]),
    "empty Parquet": ("parquet", "a.parquet", b"", ["a.parquet is not a readable Parquet file"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_file_and_the_fix(case, tmp_path):
    kind, name, content, expected = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts(source(kind, tmp_path / name))
    assert caught.value.fix
    for words in expected:
        assert words in str(caught.value)


def test_bad_parquet_columns(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"id": [1, 2], "body": ["x", None]})
    with pytest.raises(DataError, match="no field 'text'; its fields: 'id', 'body'"):
        texts(source("parquet", path))
    with pytest.raises(DataError, match="'id' holds int64, not strings"):
        texts(source("parquet", path, field="id"))
    with pytest.raises(DataError, match=r"a\.parquet row 2: field 'body' is null"):
        texts(source("parquet", path, field="body"))


def test_a_damaged_parquet_page(tmp_path):
    rows = {"text": [f"{i} some text" for i in range(4000)]}
    path = parquet(tmp_path / "a.parquet", rows, compression="snappy", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[40:4000] = b"\xff" * 3960
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read beyond row 0"):
        texts(source("parquet", path))


def test_parquet_text_that_is_not_utf8(tmp_path):
    raw = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    path = parquet(tmp_path / "a.parquet", {"text": broken})
    with pytest.raises(DataError, match=r"row 2: field 'text' is not UTF-8"):
        texts(source("parquet", path))


def test_check_finds_everything_at_once_before_anything_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n' + b"not reached")
    (tmp_path / "ok.jsonl").write_bytes(jsonl("x") + b"not reached")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "cut.txt").write_bytes(b"\n" * 65535 + "é".encode())
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    names = ["gone.txt", "empty.txt", "*.none", "cut.txt"]
    problems = check_sources(
        sources(
            {"kind": "text", "paths": [str(tmp_path / name) for name in names]},
            {"kind": "jsonl", "paths": [str(tmp_path / name) for name in ("ok.jsonl", "a.jsonl")]},
            {"kind": "parquet", "paths": [str(tmp_path)]},
            {"kind": "text", "paths": [str(tmp_path / "empty.txt")]},
        )
    )
    found = [(problem.path, problem.value) for problem in problems]
    assert found == [
        ("sources.0.paths.0", f"{tmp_path}/gone.txt does not exist"),
        ("sources.0.paths.2", f"no file matches '{tmp_path}/*.none'"),
        (
            "sources.1.paths.1",
            f"{tmp_path}/a.jsonl line 1 has no field 'text'; its fields: 'body'",
        ),
        ("sources.2.paths.0", found[3][1]),
        ("sources.3", "only empty files"),
    ]
    assert "b.parquet is not a readable Parquet file" in found[3][1]
    assert all(problem.expected and problem.fix for problem in problems)


@pytest.mark.parametrize("limit", [module.CONTENT_BYTES, 0])
def test_the_fingerprint_follows_the_content(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(module, "CONTENT_BYTES", limit)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl("one"))
    os.utime(path, ns=(10**18, 10**18))
    parts = source("jsonl", path)
    seen = {fingerprint(parts)}
    assert fingerprint(parts) in seen
    path.write_bytes(jsonl("two"))
    seen.add(fingerprint(parts))
    (tmp_path / "b.jsonl").write_bytes(jsonl("x"))
    seen.add(fingerprint(source("jsonl", tmp_path)))
    seen.add(fingerprint(source("jsonl", path, field="id")))
    assert len(seen) == 4


def test_small_sources_are_known_by_content_whatever_their_time_and_place(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("same")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    first, second = (source("text", tmp_path / name) for name in ("a.txt", "b.txt"))
    assert fingerprint(first) == fingerprint(second)
    (tmp_path / "a.txt").write_text("Same")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert fingerprint(first) != fingerprint(second)


def test_the_check_needs_no_heavy_library():
    code = (
        "import sys, longspan.trainer.data.sources\n"
        "print({'torch', 'megatron', 'pyarrow', 'tokenizers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
