import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from longspan.cache import default_cache
from longspan.errors import DataError
from longspan.trainer.data import corpus as module
from longspan.trainer.data import progress
from longspan.trainer.data.corpus import prepare_corpus
from longspan.trainer.data.settings import DataSettings, LocalTokenizer, TrainedTokenizer
from longspan.trainer.data.tokenizer import TextTokenizer

VOCAB = TrainedTokenizer(kind="train", vocab=300)


def some_texts(count, seed=0):
    words = random.Random(seed)
    return [
        " ".join(words.choices(["fox", "lazy", "naïve", "jumps", "over", str(n)], k=5 + n % 40))
        for n in range(count)
    ]


def data_of(folder, texts, name="a.jsonl", held_out=0.2):
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return settings(path, held_out)


def settings(path, held_out=0.2):
    source = {"kind": "jsonl", "paths": [str(path)]}
    return DataSettings.model_validate({"sources": [source], "held_out": held_out})


def prepare(data, cache, tokenizer=VOCAB, tokenizer_data=None, progress=False):
    stages = tokenizer_data or (data,)
    return prepare_corpus(data, tokenizer, tokenizer_data=stages, cache=cache, progress=progress)


def read_back(corpus, documents):
    """The texts of a split, each without the end-of-document token that it must end in."""
    tokenizer, texts = TextTokenizer.load(corpus.tokenizer_path), []
    for document, length in enumerate(documents.lengths.tolist()):
        tokens = documents.read(document, 0, length)
        assert tokens.dtype == np.int64 and tokens[-1] == corpus.eod
        assert corpus.eod not in tokens[:-1]
        texts.append(tokenizer.decode(tokens[:-1]))
    return texts


@contextlib.contextmanager
def no_encoding():
    """Make tokenising an error."""

    def refuse(*_):
        raise AssertionError("tokenised again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTokenizer, "encode_batch", refuse)
        yield


def leftovers(cache):
    return sorted(path.name for path in cache.glob("*.part"))


def test_every_distinct_text_comes_back_from_exactly_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 7)
    texts = some_texts(120)
    again = ["", "  \n", *texts[:30], *texts[10:20]]
    corpus = prepare(data_of(tmp_path, texts + again), tmp_path / "cache")
    train, held_out = read_back(corpus, corpus.train), read_back(corpus, corpus.held_out)
    assert sorted(train + held_out) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert corpus.info == {
        "documents": len(train),
        "tokens": int(corpus.train.lengths.sum()),
        "held_out_documents": len(held_out),
        "held_out_tokens": int(corpus.held_out.lengths.sum()),
        "duplicates": 40,
        "empty": 2,
    }
    assert 10 <= len(held_out) <= 40
    assert corpus.vocab == 300 and len(corpus.train) == len(train)
    assert corpus.train.lengths.dtype == np.int64
    assert corpus.train.read(2, 3, 4).tolist() == corpus.train.read(2, 0, 7)[3:].tolist()


def test_the_split_hangs_on_the_text_alone(tmp_path):
    texts = some_texts(80)
    (tmp_path / "b").mkdir()
    first = prepare(data_of(tmp_path, texts), tmp_path / "cache")
    more = data_of(tmp_path / "b", [*some_texts(50, seed=1), *reversed(texts)])
    second = prepare(more, tmp_path / "cache")
    held_out = set(read_back(second, second.held_out))
    assert {text for text in texts if text in held_out} == set(read_back(first, first.held_out))
    # A larger share holds out more, and never trains on what a smaller one held out.
    third = prepare(settings(tmp_path / "a.jsonl", held_out=0.5), tmp_path / "cache")
    assert set(read_back(first, first.held_out)) < set(read_back(third, third.held_out))


def test_the_tokenizer_learns_from_the_training_documents_of_all_stages(tmp_path, monkeypatch):
    learned, train = [], module.train_tokenizer

    def recorded(texts, vocab):
        learned.append(list(texts))
        return train(iter(learned[-1]), vocab)

    monkeypatch.setattr(module, "train_tokenizer", recorded)
    stages = (
        data_of(tmp_path, some_texts(60)),
        data_of(tmp_path, some_texts(60, seed=1), "b.jsonl", held_out=0.4),
        data_of(tmp_path, some_texts(60), held_out=0.3),
    )
    corpora = [prepare(stage, tmp_path / "cache", tokenizer_data=stages) for stage in stages]
    assert len(learned) == 1
    held_out = {text for corpus in corpora for text in read_back(corpus, corpus.held_out)}
    trained_on = {text for corpus in corpora for text in read_back(corpus, corpus.train)}
    assert len(set(learned[0])) == len(learned[0]) > 60
    assert not set(learned[0]) & held_out
    assert set(learned[0]) <= trained_on
    assert len({TextTokenizer.load(corpus.tokenizer_path).key for corpus in corpora}) == 1


def test_a_second_start_tokenises_nothing_and_a_changed_source_does(tmp_path):
    data, cache = data_of(tmp_path, some_texts(60)), tmp_path / "cache"
    first = prepare(data, cache)
    with no_encoding():
        assert prepare(data, cache).key == first.key
        with pytest.raises(AssertionError, match="tokenised again"):
            prepare(settings(tmp_path / "a.jsonl", held_out=0.3), cache)
    assert not leftovers(cache)
    changed = prepare(data_of(tmp_path, some_texts(61)), cache)
    assert changed.key != first.key
    assert changed.train.lengths.sum() > first.train.lengths.sum()


def test_content_is_of_the_training_tokens_and_not_of_their_files(tmp_path):
    texts, cache = some_texts(60), tmp_path / "cache"
    first = prepare(data_of(tmp_path, texts), cache)
    fixed = LocalTokenizer(kind="hf", path=str(first.tokenizer_path))
    given = [texts, texts[::-1], some_texts(70), texts[:-10]]
    found = []
    for number, changed in enumerate(given):
        found.append(prepare(data_of(tmp_path, changed, f"{number}.jsonl"), cache, fixed))
    assert found[0].content == first.content and found[0].tokenizer_key == first.tokenizer_key
    with no_encoding():
        assert prepare(data_of(tmp_path, texts, "0.jsonl"), cache, fixed).content == first.content
    assert len({corpus.content for corpus in found}) == len(given)


def test_a_local_tokenizer(tmp_path):
    data = data_of(tmp_path, some_texts(60))
    trained = prepare(data, tmp_path / "cache")
    local = LocalTokenizer(kind="hf", path=str(trained.tokenizer_path / "tokenizer.json"))
    corpus = prepare(data, tmp_path / "other", local)
    assert read_back(corpus, corpus.train) == read_back(trained, trained.train)
    half = prepare(settings(tmp_path / "a.jsonl", held_out=0.5), tmp_path / "other", local)
    assert len(half.held_out) > len(corpus.held_out)
    with pytest.raises(DataError, match="no tokenizer at"):
        prepare(data, tmp_path / "cache", LocalTokenizer(kind="hf", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("texts", "held_out", "message"),
    [
        ([], 0.2, "the sources hold no text at all"),
        (["", " \n"], 0.2, "the sources hold no text at all"),
        (["one", "two", "one"], 1e-9, "none of 2 distinct documents is left to hold out"),
        (["one", "two"], 1 - 1e-9, "none of 2 distinct documents is left to train on"),
    ],
)
def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path, texts, held_out, message):
    trained = prepare(data_of(tmp_path, some_texts(60), "t.jsonl"), tmp_path / "other")
    local = LocalTokenizer(kind="hf", path=str(trained.tokenizer_path))
    data = data_of(tmp_path, texts, held_out=held_out)
    for tokenizer in (VOCAB, local):
        with pytest.raises(DataError, match=message) as caught:
            prepare(data, tmp_path / "cache", tokenizer)
        assert caught.value.fix
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 100)
    data, cache = data_of(tmp_path, some_texts(4000)), tmp_path / "cache"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of a file stops the write in the way that a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(DataError, match=r"no space left for .*corpus-\w+") as caught:
            prepare(data, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "MiB more are needed" in caught.value.what and "LONGSPAN_CACHE" in caught.value.fix
    assert not leftovers(cache) and not [p for p in cache.glob("corpus-*") if p.is_dir()]
    assert prepare(data, cache).info["documents"] > 3000


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*file") as caught:
        prepare(data_of(tmp_path, some_texts(60)), tmp_path / "file" / "cache")
    assert "LONGSPAN_CACHE" in caught.value.fix


def test_a_damaged_corpus_is_told(tmp_path):
    data, cache = data_of(tmp_path, some_texts(60)), tmp_path / "cache"
    path = prepare(data, cache).tokenizer_path.parent / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"corpus-\w+ are damaged") as caught:
        prepare(data, cache)
    assert "delete that folder" in caught.value.fix


def test_sources_that_change_meanwhile_are_refused(tmp_path, monkeypatch):
    data, cache = data_of(tmp_path, some_texts(60)), tmp_path / "cache"
    encode = TextTokenizer.encode_batch

    def write_too(tokenizer, texts):
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')
        return encode(tokenizer, texts)

    monkeypatch.setattr(TextTokenizer, "encode_batch", write_too)
    with pytest.raises(DataError, match="changed while they were being read"):
        prepare(data, cache)
    assert not leftovers(cache)


class Process:
    """`corpus_process.py` with its imports done, started by `go`."""

    def __init__(self, data, cache, hang=False):
        job = {"data": data.model_dump(mode="json"), "cache": str(cache), "hang": hang}
        self.running = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("corpus_process.py"))],
            env={**os.environ, "CORPUS_PROCESS": json.dumps(job), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self):
        return self.running.stdout.readline().strip()

    def go(self):
        self.running.stdin.close()
        self.running.stdin = None

    def result(self):
        out, err = self.running.communicate(timeout=120)
        assert self.running.returncode == 0, err
        return json.loads(out.splitlines()[-1]), err


def test_several_processes_at_once_make_one_corpus(tmp_path):
    data, cache = data_of(tmp_path, some_texts(400)), tmp_path / "cache"
    processes = [Process(data, cache) for _ in range(3)]
    assert [process.line() for process in processes] == ["ready"] * 3
    for process in processes:
        process.go()
    results = [process.result()[0] for process in processes]
    assert len({(r["key"], r["inode"], r["tokens"]) for r in results}) == 1
    assert sorted(r["batches"] for r in results)[:2] == [0, 0]
    assert max(r["batches"] for r in results) == 20


def test_a_killed_writer_neither_blocks_nor_confuses_the_next(tmp_path):
    data, cache = data_of(tmp_path, some_texts(400)), tmp_path / "cache"
    victim, waiting = Process(data, cache, hang=True), Process(data, cache)
    victim.go()
    assert [victim.line(), victim.line()] == ["ready", "hanging"]
    (unfinished,) = leftovers(cache)
    (cache / unfinished / "from the victim").write_text("")
    waiting.go()
    told = next(line for line in waiting.running.stderr if line.startswith("longspan: "))
    assert told.startswith(f"longspan: waiting for process {victim.running.pid} on ")
    assert [path.name for path in cache.glob("corpus-*") if path.is_dir()] == [unfinished]
    victim.running.send_signal(signal.SIGKILL)
    victim.running.communicate()
    result, _ = waiting.result()
    assert result["batches"] == 20
    with no_encoding():
        corpus = prepare(data, cache)
    assert corpus.key == result["key"] and not leftovers(cache)
    assert not (corpus.tokenizer_path.parent / "from the victim").exists()
    clean = prepare(data, tmp_path / "clean")
    assert read_back(clean, clean.train) == read_back(corpus, corpus.train)


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    data = data_of(tmp_path, some_texts(60))
    prepare(data, tmp_path / "cache", progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "longspan: training the tokenizer: 1%\n" in shown.err
    assert shown.err.splitlines()[-1] == "longspan: tokenising: 100%"
    prepare(data, tmp_path / "other")
    assert capsys.readouterr() == ("", "")


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache() == Path("/home/me/mine")
    monkeypatch.delenv("LONGSPAN_CACHE")
    assert default_cache() == Path("/xdg/longspan")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path("/home/me/.cache/longspan")
