"""Windows of a text: parts without overlap, the next character as the target, order and place of an epoch."""

from __future__ import annotations

import pytest
import torch

from fff.data import TextData, sources
from fff.data.text import load_text

pytestmark = pytest.mark.filterwarnings("ignore:.* holds a text of digest")
NAME = "tiny_shakespeare"
# Characters are their own places, so that a window tells where it was cut.
TEXT = "".join(chr(0x4E00 + place) for place in range(500))


@pytest.fixture
def root(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "input.txt").write_bytes(TEXT.encode())
    return tmp_path


@pytest.fixture
def data(root):
    return lambda **options: TextData(NAME, **{"root": root, "context": 7, "batch_size": 4, **options})


def rows(loader):
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


def test_facts_about_the_text(data):
    made = data()
    assert made.in_shape == (7,) and made.num_classes == 500 and "".join(made.class_names) == TEXT


def test_the_parts_do_not_overlap_and_cover_the_text_in_order(data):
    """Of 500 characters 400, 50 and 50; a window of 7 and its targets need 8."""
    made = data()
    seen = {}
    for name in ("train_eval", "val", "test"):
        x, y = rows(getattr(made, f"{name}_dataloader")())
        assert torch.equal(y[:, :-1], x[:, 1:]) and torch.equal(y, x + 1)
        assert torch.equal(x.flatten(), x[0, 0] + torch.arange(x.numel())), "each character once, in order"
        seen[name] = {*x.flatten().tolist(), *y.flatten().tolist()}
    assert seen["train_eval"] == set(range(400))  # 57 windows of 7, and a last target
    assert seen["val"] == set(range(400, 450)) and seen["test"] == set(range(450, 500))


def test_training_windows_begin_at_every_character_of_the_training_part(data):
    x, y = rows(data(batch_size=1).train_dataloader())
    assert x.dtype == y.dtype == torch.int64 and torch.equal(y, x + 1)
    assert sorted(x[:, 0].tolist()) == list(range(393)) and y.max() == 399
    assert x[:, 0].tolist() != list(range(393))


def test_batches_are_a_function_of_seed_and_epoch(data):
    def starts(seed, epoch):
        loader = data(seed=seed).train_dataloader()
        loader.set_epoch(epoch)
        return [x[:, 0].tolist() for x, _ in loader]

    assert starts(3, 1) == starts(3, 1)
    assert len({str(starts(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4
    assert all(len(batch) == 4 for batch in starts(3, 0))


def test_an_epoch_goes_on_where_it_stopped(data):
    loader = data(seed=3).train_dataloader()
    whole = [x[:, 0].tolist() for x, _ in loader]
    running = iter(loader)
    next(running), next(running)
    resumed = data(seed=3).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [x[:, 0].tolist() for x, _ in resumed] == whole[2:]


@pytest.mark.parametrize("context", [50, 390, 440, 1000])
def test_a_context_that_no_part_holds_is_named(data, context):
    assert len(rows(data(context=49).val_dataloader())[0]) == len(rows(data(context=49).test_dataloader())[0]) == 1
    with pytest.raises(ValueError, match=f"context={context} is too long"):
        _ = data(context=context).train_rows


@pytest.mark.parametrize("options, named", [({"context": 0}, "context"), ({"batch_size": 0}, "batch_size")])
def test_bad_arguments_are_named(data, options, named):
    with pytest.raises(ValueError, match=f"{named} must be at least 1, got 0"):
        data(**options)


def test_another_text_of_that_name_is_told(root):
    with pytest.warns(UserWarning, match=r"input.txt holds a text of digest .*86c4e6aa9db7c042"):
        assert load_text(NAME, root) == TEXT


@pytest.mark.parametrize("read", [sources.check_available, load_text])
def test_a_missing_text_is_told_in_one_line(no_hub, tmp_path, monkeypatch, read):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError) as error:
        read(NAME, tmp_path)
    assert str(error.value).startswith(f"data set {NAME!r} not found: neither as {tmp_path}/{NAME}/input.txt nor on")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="root, or FFF_DATA_DIR, is not set"):
        read(NAME)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name must be one of tiny_shakespeare, got 'usps'"):
        load_text("usps", tmp_path)


def test_the_splits_of_the_hub_are_the_text_again(monkeypatch):
    import datasets

    parts = {"train": TEXT[:450], "validation": TEXT[450:475], "test": TEXT[475:]}
    monkeypatch.setattr("fff.data.text.check_available", lambda *_: None)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, revision: {split: {"text": [text]} for split, text in parts.items()}
    )
    assert load_text(NAME) == TEXT


@pytest.mark.filterwarnings("error:.* holds a text of digest")
def test_the_real_text(real_root):
    made = TextData(NAME, root=real_root)
    assert made.num_classes == 65 and made.in_shape == (128,)
    x, _ = rows(made.train_eval_dataloader())
    assert "".join(made.class_names[i] for i in x[0, :14]) == "First Citizen:"
