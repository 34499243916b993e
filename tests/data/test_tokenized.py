"""Any text set by a tokenizer: official splits or parts by position, separators, characters of the test's tokens."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from fff.data import TokenizedText, sources

tokenizers = pytest.importorskip("tokenizers")
NAME, HUB_ID, END = "tales", "someone/tales", "<|endoftext|>"


def write_set(folder, column="text", **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        pd.DataFrame({column: rows}).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def data(tmp_path):
    def make(tokenizer, **options):
        if not isinstance(tokenizer, str):
            tokenizer.save(str(tmp_path / "tokenizer.json"))
            tokenizer = str(tmp_path / "tokenizer.json")
        known = {"hub_id": HUB_ID, "root": tmp_path, "context": 4, "batch_size": 2, "separator": None}
        return TokenizedText(NAME, tokenizer=tokenizer, **{**known, **options})

    return make


def words(count=500):
    """A tokenizer of w0, w1 and so on, which are their own places in w0 w1 ..., so that a window tells where it is."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{place}": place for place in range(count)}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def pairs():
    """Of the tokens a, b, ab and the end of a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens([END])
    return tokenizer


def trained(rows):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows, trainer)
    # As BERT's and Llama's do, where nobody asks for the text alone.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def sequence(loader):
    """The tokens that the windows of an unshuffled loader go through, and those that they predict."""
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    assert x.dtype == y.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1]), "each token once, in order"
    return torch.cat([x.flatten(), y.flatten()[-1:]]).tolist()


def test_the_official_splits_are_the_parts(data, tmp_path):
    rows = {
        "train": ["Ring a rosé.\n", "", "A pocket full of posies.\n"] * 3,
        "validation": ["Hush a bye, baby.\n"] * 3,
        "test": ["Hey diddle diddlé!\n"] * 3,
    }
    write_set(tmp_path / NAME, **rows)
    tokenizer = trained(rows["train"])
    made = data(tokenizer)
    assert made.in_shape == (4,) and made.num_classes == tokenizer.get_vocab_size() == len(made.class_names)
    assert made.class_names[tokenizer.token_to_id("Ġa")] == " a"
    for name, split in (("train_eval", "train"), ("val", "validation"), ("test", "test")):
        text = "".join(rows[split])
        tokens = sequence(getattr(made, f"{name}_dataloader")())
        # The last token may be half a character.
        assert text.startswith(tokenizer.decode(tokens).rstrip("\ufffd"))
        assert tokenizer.token_to_id(END) not in tokens
        of_text = tokenizer.encode(text, add_special_tokens=False).ids
        assert len(of_text) - len(tokens) < 4, "only what fills no window is left out"
    assert made.characters_per_token == len(tokenizer.decode(tokens[1:])) / len(tokens[1:])
    assert made.text.tokens.dtype == torch.int32


@pytest.mark.parametrize(
    "official, train, validation, test",
    [
        ([], range(400), range(400, 450), range(450, 500)),
        (["validation"], range(450), [7] * 30, range(450, 500)),
        (["test"], range(450), range(450, 500), [7] * 30),
    ],
)
def test_a_missing_split_is_cut_from_the_end_of_the_training_tokens(data, tmp_path, official, train, validation, test):
    text = [" ".join(f"w{place}" for place in range(start, start + 50)) for start in range(0, 500, 50)]
    write_set(tmp_path / NAME, train=text, **dict.fromkeys(official, ["w7 " * 30]))
    made = data(words(), context=7, batch_size=1)
    assert made.text.tokens.tolist() == [*train, *validation, *test]
    assert (made.text.validation, made.text.test) == (len(train), len(train) + len(validation))
    assert sorted(x[0, 0].item() for x, _ in made.train_dataloader()) == list(train)[:-7]


def test_the_separator_stands_behind_each_row(data, tmp_path):
    write_set(tmp_path / NAME, train=["ab", None, "ba"] + ["ab", "", "ba"] * 20)
    with_end, without = (data(pairs(), separator=separator).text for separator in (END, None))
    assert with_end.tokens[:6].tolist() == [2, 3, 3, 1, 0, 3]
    assert without.tokens[:6].tolist() == [2, 1, 0, 2, 1, 0]
    assert with_end.vocabulary == ["a", "b", "ab", END]
    assert with_end.digest == data(pairs(), separator=END).content_digest != without.digest


def test_characters_are_those_of_the_predicted_tokens(data, tmp_path):
    """Of ab ab b end ab ab end, the one window of four predicts ab b end ab: five characters."""
    write_set(tmp_path / NAME, train=["ab" * 9], validation=["ab" * 9], test=["ababb", "abab"])
    made = data(pairs(), separator=END)
    assert made.rows.test_y.tolist() == [[2, 1, 3, 2]]
    assert made.characters_per_token == 5 / 4


def test_lengths_in_the_file_of_a_tokenizer_cut_nothing(data, tmp_path):
    write_set(tmp_path / NAME, train=["ab" * 30, "ab"])
    tokenizer = pairs()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    assert data(tokenizer).text.tokens.tolist() == [2] * 31


def test_what_the_hub_is_asked_for(data, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*place, **options):
        asked.append((*place, options))
        return {"train": datasets.Dataset.from_dict({"story": ["ab" * 30]})}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "_out_of_reach", lambda hub_id: "")
    assert len(data(pairs(), column="story", config="short", revision="abc").text.tokens) == 30
    assert asked == [(HUB_ID, {"name": "short", "revision": "abc"})]


@pytest.mark.parametrize(
    "split, options, named",
    [
        ("train", {"separator": "</s>"}, "separator='</s>' is no token of tokenizer="),
        ("train", {"column": "story"}, "has no column 'story', only .*text"),
        ("test", {}, "has no split 'train', only .*test"),
        ("train", {"context": 100}, "context=100 is too long for a part of 18 tokens"),
        ("train", {"context": 0}, "context must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(data, tmp_path, split, options, named):
    write_set(tmp_path / NAME, **{split: ["ab" * 20]})
    with pytest.raises(ValueError, match=named):
        data(pairs(), **options).setup()


def test_a_column_of_numbers_is_named(data, tmp_path):
    write_set(tmp_path / NAME, train=[1, 2])
    with pytest.raises(ValueError, match="has no text in column 'text' of split 'train', but .*int64"):
        data(pairs()).setup()


def test_what_is_no_tokenizer_is_named(data, tmp_path):
    write_set(tmp_path / NAME, train=["ab" * 20])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer=.*broken.json' holds no tokenizer: "):
        data(str(tmp_path / "broken.json")).setup()


def test_a_tokenizer_whose_tokens_have_no_text_is_named(data, tmp_path):
    write_set(tmp_path / NAME, train=["ab" * 20])
    tokenizer = pairs()
    tokenizer.decoder = None
    with pytest.raises(ValueError, match="tokenizer=.* has no decoder"):
        data(tokenizer).setup()


def test_a_configuration_that_a_clone_has_not_is_named(data, tmp_path):
    for name in ("small", "large"):
        write_set(tmp_path / NAME / name, train=["ab" * (20 if name == "small" else 30)])
    sections = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("small", "large")
    )
    (tmp_path / NAME / "README.md").write_text(f"---\nconfigs:\n{sections}---\n")
    assert len(data(pairs(), config="large").text.tokens) > len(data(pairs(), config="small").text.tokens)
    with pytest.raises(ValueError, match="config='lagre' is none of small, large"):
        data(pairs(), config="lagre").setup()


def test_what_is_missing_is_told_in_one_line(data, tmp_path, no_hub, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    for tokenizer, message in (
        (pairs(), f"data set {NAME!r} not found: neither in the folder {tmp_path}/{NAME} nor on the Hub as {HUB_ID!r}"),
        (str(tmp_path / "none.json"), f"tokenizer='{tmp_path}/none.json' not found: no such file"),
        ("gpt2", "tokenizer='gpt2' not found on the Hub (offline"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            data(tokenizer).setup()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
        write_set(tmp_path / NAME, train=["ab" * 20])  # from here on the tokenizer is what is missing
