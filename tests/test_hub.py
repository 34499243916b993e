"""Layers in folders and repositories: what is saved is what is loaded, or an error that says why."""

import json
import math

import pytest
import torch

import fff

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
hub = pytest.importorskip("fff.hub", reason="huggingface-hub or safetensors is not installed")

LAYERS = {
    "tree": lambda: fff.FFF(6, 4, 5, depth=2, mode="gated", master_width=3, bias_update_rate=0.1),
    "depth 0": lambda: fff.FFF(6, 4, depth=0),
    "mixture": lambda: fff.MoE(6, 4, num_experts=4, router="sigmoid", base=True, act_layer="gelu"),
    "ultra": lambda: fff.UltraFFF(6, depth=3),
    "dense": lambda: fff.FeedForward(6, 8, glu=True),
    "patches": lambda: fff.PatchMoE(6, num_experts=2, num_patches=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_there_and_back(name, dtype, tmp_path):
    layer = LAYERS[name]().to(dtype).eval()
    hub.save_pretrained(layer, tmp_path / "new" / "folder")
    loaded = hub.from_pretrained(tmp_path / "new" / "folder")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}
    assert type(loaded) is type(layer) and loaded.arguments() == layer.arguments()
    for (key, old), (again, new) in zip(layer.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == again and old.dtype == new.dtype and torch.equal(old, new)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in layer.parameters()]
    x = torch.randn(9, 6, dtype=dtype)
    assert torch.equal(loaded(x), layer(x))


def test_strided_weights_are_written_as_they_read(tmp_path):
    layer = fff.FeedForward(6, 8)
    layer.w_out.data = layer.w_out.data.mT.contiguous().mT
    hub.save_pretrained(layer, tmp_path)
    assert torch.equal(hub.from_pretrained(tmp_path).w_out, layer.w_out)


def test_repository_of_the_hub(tmp_path, monkeypatch):
    """One that lies in the cache, as a download leaves it; the tests have no network."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    layer = fff.FFF(6, 4, depth=2)
    repository = tmp_path / "models--someone--tree"
    hub.save_pretrained(layer, repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(hub.from_pretrained("someone/tree", revision="v1").w_in, layer.w_in)
    with pytest.raises(LocalEntryNotFoundError):  # of the default branch there is none
        hub.from_pretrained("someone/tree")


def broken(tmp_path, **changes):
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"class": "Linear"}, "class='Linear' is none of"),
        ({"class": ["FFF"]}, "class=.'FFF'. is none of"),
        ({"arguments": {"in_features": 2**40, "leaf_width": 2**40, "depth": 2}}, "config.json: "),
        ({"class": None}, r"config.json lacks \['class'\]"),
        ({"arguments": {"in_features": 6, "leaf_width": 4, "depth": 1}}, "b_in has shape .4, 4., FFF needs .2, 4."),
        ({"arguments": {"in_features": 6, "leaf_width": 4, "depth": 2, "bias": False}}, "b_in has .*FFF needs None"),
        ({"arguments": {"in_features": 6, "leaf_width": 4, "depth": 2, "base": True}}, "base_b_in has shape None"),
        ({"arguments": {"in_features": 6, "leaf_width": 4, "depth": math.pi}}, "depth=3.14"),
        ({"arguments": {"in_features": 6, "leaf_width": 4, "levels": 2}}, "argument 'levels'"),
        # Weights of a petabyte.
        ({"arguments": {"in_features": 10**6, "leaf_width": 10**4, "depth": 14}}, "b_in has .*FFF needs .16384, 10000"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(changes, named, tmp_path):
    hub.save_pretrained(fff.FFF(6, 4, depth=2), tmp_path)
    broken(tmp_path, **changes)
    with pytest.raises(ValueError, match=named) as error:
        hub.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_no_configuration_or_no_weights_is_told(tmp_path):
    hub.save_pretrained(fff.FFF(6, 4, depth=2), tmp_path)
    with pytest.raises(ValueError, match="revision='v1' is of a repository"):
        hub.from_pretrained(tmp_path, revision="v1")
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    safetensors.save_file(weights | {"w_in": weights["w_in"].long()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="w_in holds torch.int64"):
        hub.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('["class", "arguments"]')
    with pytest.raises(ValueError, match="config.json is no JSON object"):
        hub.from_pretrained(tmp_path)


def test_a_mistyped_folder_is_told_in_one_line():
    with pytest.raises(ValueError, match="'/no/such/folder' is neither a folder nor a repository") as error:
        hub.from_pretrained("/no/such/folder")
    assert "\n" not in str(error.value)


def test_tied_parameters_leave_what_was_saved_before(tmp_path):
    layer = fff.FeedForward(6, 4)
    hub.save_pretrained(layer, tmp_path)
    tied = fff.FeedForward(6, 8)
    tied.w_out = tied.w_in
    with pytest.raises(RuntimeError, match="share memory"):
        hub.save_pretrained(tied, tmp_path)
    assert torch.equal(hub.from_pretrained(tmp_path).w_in, layer.w_in)


def test_nothing_is_written_for_a_layer_that_cannot_be_told(tmp_path):
    with pytest.raises(ValueError, match="act_layer="):
        hub.save_pretrained(fff.FeedForward(6, 4, act_layer=torch.nn.PReLU()), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
