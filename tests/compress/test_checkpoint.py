"""Factored checkpoints come back as they were, and mismatches are named."""

import errno
import json
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from flashsvd_compile.compress import LowRankLinear, compress, load_factored, save_factored
from flashsvd_compile.compress.checkpoint import FORMAT, LAYERS_KEY
from flashsvd_compile.errors import CheckpointError


def make(width: int = 24, depth: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=bool(i % 2)) for i in range(depth)))


def test_round_trip(tmp_path: Path):
    small = compress(make(), ranks={"0": 5, "1": 3})
    save_factored(small, tmp_path / "model.safetensors")
    dense = make()
    loaded = load_factored(dense, tmp_path / "model.safetensors")
    x = torch.randn(4, 24)
    assert torch.equal(loaded(x), small(x))
    assert type(dense[0]) is nn.Linear


def test_round_trip_of_a_model_with_a_dense_layer_and_a_bias_on_the_first_factor(tmp_path: Path):
    small = nn.Sequential(LowRankLinear(nn.Linear(24, 5), nn.Linear(5, 24)), nn.Linear(24, 24))
    save_factored(small, tmp_path / "model.safetensors")
    loaded = load_factored(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), tmp_path / "model.safetensors")
    x = torch.randn(4, 24)
    assert torch.equal(loaded(x), small(x))


def test_round_trip_with_tied_weights(tmp_path: Path):
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    small = compress(GPT2LMHeadModel(config).eval())
    save_factored(small, tmp_path / "model.safetensors")
    loaded = load_factored(GPT2LMHeadModel(config).eval(), tmp_path / "model.safetensors")
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_round_trip_with_a_shared_bias(tmp_path: Path):
    def make_shared() -> nn.Sequential:
        model = make(depth=3)
        model[0].bias = model[1].bias
        return model

    small = compress(make_shared(), targets=["0", "1"])
    save_factored(small, tmp_path / "model.safetensors")
    loaded = load_factored(make_shared(), tmp_path / "model.safetensors")
    x = torch.randn(4, 24)
    assert torch.equal(loaded(x), small(x))
    assert loaded[0].bias is loaded[1].bias


def test_compiled_model_is_saved_as_the_model_itself(tmp_path: Path):
    small = compress(make())
    save_factored(torch.compile(small, backend="eager"), tmp_path / "model.safetensors")  # pyright: ignore
    x = torch.randn(4, 24)
    assert torch.equal(load_factored(make(), tmp_path / "model.safetensors")(x), small(x))


def test_compiled_model_is_loaded_as_the_model_itself(tmp_path: Path):
    small = compress(make())
    save_factored(small, tmp_path / "model.safetensors")
    loaded = load_factored(torch.compile(make()), tmp_path / "model.safetensors")  # pyright: ignore[reportArgumentType]
    x = torch.randn(4, 24)
    assert torch.equal(loaded(x), small(x))


def test_dtype_is_the_models(tmp_path: Path):
    save_factored(compress(make()), tmp_path / "model.safetensors")
    loaded = load_factored(make().to(torch.bfloat16), tmp_path / "model.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_weights_on_the_meta_device_are_loaded(tmp_path: Path):
    def make_tied() -> nn.Sequential:
        model = make(depth=3)
        model[1].bias.requires_grad_(False)
        return model.append(nn.BatchNorm1d(24)).append(model[2]).eval()

    small = compress(make_tied(), targets=["0", "1"])
    save_factored(small, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = make_tied()
    loaded = load_factored(empty, tmp_path / "model.safetensors")
    x = torch.randn(4, 24)
    assert torch.equal(loaded(x), small(x))
    assert loaded[2] is loaded[4]
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["1.up.bias"]


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        save_factored(compress(make()), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    @pytest.mark.parametrize("model", [None, {}])
    def test_no_module(self, tmp_path: Path, model):
        with pytest.raises(CheckpointError, match=re.escape(f"the model must be an nn.Module, not {model!r}")):
            save_factored(model, tmp_path / "model.safetensors")

    def test_arguments_the_wrong_way_round(self, path: Path):
        with pytest.raises(CheckpointError, match=r"a string or a PathLike, not an object of type Sequential$"):
            load_factored(path, make())  # pyright: ignore

    def test_model_that_is_low_rank_already(self, path: Path):
        with pytest.raises(CheckpointError, match="layer '0' of the model is low-rank already; give the dense model"):
            load_factored(compress(make()), path)

    def test_folder(self, tmp_path: Path):
        with pytest.raises(CheckpointError, match=r"it is a folder; give the file \(`flashsvd compress` writes"):
            load_factored(make(), tmp_path)

    def test_file_that_may_not_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        """By whoever runs the tests, who may be root."""

        def refuse(*_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError, match=r"cannot read .*Permission denied"):
            load_factored(make(), path)

    def test_dense_model_is_not_saved(self, tmp_path: Path):
        with pytest.raises(CheckpointError, match="no low-rank layer"):
            save_factored(make(), tmp_path / "model.safetensors")

    @pytest.mark.parametrize("where", ["absent/model.safetensors", "."])
    def test_file_that_cannot_be_written(self, tmp_path: Path, where: str):
        with pytest.raises(CheckpointError, match=f"cannot write {tmp_path / where}"):
            save_factored(compress(make()), tmp_path / where)

    @pytest.mark.parametrize("path", [None, 3, b"model.safetensors"])
    def test_no_path(self, path):
        message = re.escape(f"the path of a checkpoint must be a string or a PathLike, not {path!r}")
        with pytest.raises(CheckpointError, match=message):
            save_factored(compress(make()), path)
        with pytest.raises(CheckpointError, match=message):
            load_factored(make(), path)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_model_that_cannot_be_copied(self, path: Path):
        with pytest.raises(CheckpointError, match="the model is a ScriptModule"):
            load_factored(torch.jit.script(make()), path)
        with pytest.raises(CheckpointError, match=r"the model must be an nn\.Module, not None"):
            load_factored(None, path)  # pyright: ignore

    def test_model_with_a_lock(self, path: Path):
        model = make()
        model.lock = threading.Lock()  # pyright: ignore[reportArgumentType]
        with pytest.raises(CheckpointError, match=r"Sequential cannot be copied: .*lock"):
            load_factored(model, path)

    def test_model_without_numbers_is_not_saved(self, tmp_path: Path):
        with pytest.raises(CheckpointError, match=r"'0.down.weight' has no numbers: it is on the meta device"):
            save_factored(compress(make()).to("meta"), tmp_path / "model.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_factors_of_integers(self, path: Path, tmp_path: Path):
        with safe_open(str(path), framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        tensors["0.up.weight"] = tensors["0.up.weight"].to(torch.int8)
        save_file(tensors, tmp_path / "integers.safetensors", metadata)
        with pytest.raises(CheckpointError, match=r"'0.up.weight' is I8, expected numbers in floating point"):
            load_factored(make(), tmp_path / "integers.safetensors")

    def test_buffer_on_the_meta_device_that_is_not_saved(self, path: Path):
        model = make()
        model.register_buffer("positions", torch.arange(4, device="meta"), persistent=False)
        with pytest.raises(CheckpointError, match="buffer 'positions' is on the meta device"):
            load_factored(model, path)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (None, "flashsvd_layers of its metadata is not JSON"),
            ("{", "flashsvd_layers of its metadata is not JSON"),
            ("[]", r"is \[\], expected layers by name"),
            ({"0": 3}, "layer '0' is 3, expected a shape"),
            ({"0": {}}, r"layer '0' is {}, expected a shape such as {'in_features"),
            ({"rank": "3"}, "'rank': '3'.*expected a shape"),
            ({"rank": True}, "'rank': True.*expected a shape"),
            ({"rank": 0}, "'rank': 0.*expected a shape"),
            ({"rank": 2**62}, "no layer '0' of rank 4611686018427387904"),
            ({"rank": 10**30}, "no layer '0' of rank 1000000000000000000"),
        ],
    )
    def test_layers_that_are_broken(self, tmp_path: Path, layers: object, message: str):
        if isinstance(layers, dict) and "rank" in layers:
            shape = {"in_features": 24, "out_features": 24, "down_bias": False, "bias": False}
            layers = {"0": shape | layers}
        text = layers if isinstance(layers, str) else json.dumps(layers)
        metadata = {"format": FORMAT} | ({LAYERS_KEY: text} if layers is not None else {})
        save_file(make().state_dict(), tmp_path / "broken.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=f"broken.safetensors: .*{message}"):
            load_factored(make(), tmp_path / "broken.safetensors")

    @pytest.mark.parametrize("name", ["absent.safetensors", "absent\0.safetensors"])
    def test_no_such_file(self, tmp_path: Path, name: str):
        with pytest.raises(CheckpointError, match=r"cannot read .*absent"):
            load_factored(make(), tmp_path / name)

    def test_no_safetensors_file(self, tmp_path: Path):
        (tmp_path / "text").write_text("no tensors here")
        with pytest.raises(CheckpointError, match="text"):
            load_factored(make(), tmp_path / "text")

    def test_dense_checkpoint(self, tmp_path: Path):
        save_file(make().state_dict(), tmp_path / "dense.safetensors")
        with pytest.raises(CheckpointError, match="not a factored checkpoint"):
            load_factored(make(), tmp_path / "dense.safetensors")

    def test_layer_not_in_the_model(self, path: Path):
        with pytest.raises(CheckpointError, match="no dense layer '1'"):
            load_factored(make(depth=1), path)

    def test_layer_of_another_shape(self, path: Path):
        with pytest.raises(CheckpointError, match=r"layer '0'.*24.*32"):
            load_factored(make(width=32), path)

    def test_model_with_more_layers(self, path: Path):
        with pytest.raises(CheckpointError, match=r"2\.weight"):
            load_factored(make(depth=3), path)
