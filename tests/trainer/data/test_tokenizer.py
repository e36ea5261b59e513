import json

import pytest
from longspan.errors import DataError
from longspan.trainer.data import tokenizer as module
from longspan.trainer.data.tokenizer import END_OF_TEXT, TextTokenizer, train_tokenizer

TEXTS = ["def naïve(x):\n    return x  # 东京 🙂\n" * 5, "the quick brown fox\n" * 40]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(iter(TEXTS), 300)


def hub_folder(folder, tokenizer, config, **changes):
    """A folder as Hugging Face writes it, with some of `tokenizer.json` changed."""
    tokenizer.save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**model, **changes}))
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_bytes_come_back_and_the_vocabulary_is_as_large_as_asked(trained):
    assert trained.vocab == 300 and trained.eod == 0
    for text in ["", "the quick fox", "naïve 东京 🙂 \x00\r\n\t never seen: ж", f"a{END_OF_TEXT}b"]:
        ids = trained.encode_batch([text])[0]
        assert trained.decode(ids) == text
        assert trained.eod not in ids and (ids < trained.vocab).all()


def test_the_same_texts_give_the_same_tokenizer(trained, monkeypatch):
    assert train_tokenizer(iter(TEXTS), 300).key == trained.key
    assert train_tokenizer(iter(TEXTS), 299).key != trained.key


def test_few_texts_give_a_smaller_vocabulary():
    tokenizer = train_tokenizer(iter(["ab"]), 4096)
    assert tokenizer.vocab == 258


def test_long_texts_are_encoded_in_parts_that_change_nothing(trained, monkeypatch):
    text = "\n".join(f"the fox {i}\n    of naïve, quick x({i})  \n" for i in range(300))
    whole = trained.encode_batch([text, "x", text])
    monkeypatch.setattr(module, "PART_CHARACTERS", 400)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1000)
    assert len(module._parts(text)) > 20 and "".join(module._parts(text)) == text
    assert max(map(len, module._parts(text))) <= 400
    parts = trained.encode_batch([text, "x", text])
    assert [ids.tolist() for ids in parts] == [ids.tolist() for ids in whole]
    assert trained.encode_batch([]) == []
    assert train_tokenizer(iter([text]), 400).key == train_tokenizer(iter([text]), 400).key


def test_a_text_without_seams_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(module, "PART_CHARACTERS", 10)
    assert module._parts("x" * 25) == ["x" * 10, "x" * 10, "x" * 5]


def test_saved_folders_load_here_and_in_transformers(trained, tmp_path):
    trained.save(tmp_path)
    again = TextTokenizer.load(tmp_path)
    assert (again.key, again.vocab, again.eod) == (trained.key, 300, 0)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.eos_token_id == trained.eod
    assert theirs(TEXTS[0])["input_ids"] == trained.encode_batch(TEXTS)[0].tolist()


def test_a_hub_tokenizer_encodes_without_its_own_extras(trained, tmp_path):
    extras = {
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}
            },
        },
    }
    folder = hub_folder(tmp_path / "hub", trained, {"eos_token": END_OF_TEXT}, **extras)
    loaded = TextTokenizer.load(folder)
    expected = trained.encode_batch(TEXTS)
    assert [i.tolist() for i in loaded.encode_batch(TEXTS)] == [i.tolist() for i in expected]


@pytest.mark.parametrize(
    ("config", "special", "eod"),
    [
        ({"eos_token": "Z"}, None, "Z"),
        ({"eos_token": {"content": "Z", "lstrip": False}}, None, "Z"),
        ({"eos_token": None}, {"eos_token": "Z"}, "Z"),
        (None, None, END_OF_TEXT),
    ],
)
def test_the_end_of_text_token_is_found(trained, tmp_path, config, special, eod):
    folder = hub_folder(tmp_path / "hub", trained, config)
    if special:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    by_folder = TextTokenizer.load(folder)
    by_file = TextTokenizer.load(folder / "tokenizer.json")
    assert by_folder.decode(by_folder.encode_batch([""])[0]) == ""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert by_folder.eod == by_file.eod == vocabulary[eod]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no tokenizer at"),
        (b"{", "not a tokenizer that the tokenizers library can read"),
        ({"vocab": {"a": 0, "b": 1}}, "has no end-of-text token"),
        ({"vocab": {"a": 0}}, "has 1 tokens"),
    ],
)
def test_unusable_tokenizers_are_refused_with_a_fix(tmp_path, content, message):
    if isinstance(content, dict):
        content = json.dumps({"model": {"type": "BPE", "merges": [], **content}}).encode()
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        TextTokenizer.load(tmp_path)
    assert caught.value.fix and str(tmp_path) in str(caught.value)


def test_an_end_of_text_token_outside_the_vocabulary_is_refused(trained, tmp_path):
    folder = hub_folder(tmp_path / "hub", trained, {"eos_token": "<eos>"})
    with pytest.raises(DataError, match=r"tokenizer_config.json of .* names '<eos>'"):
        TextTokenizer.load(folder)
