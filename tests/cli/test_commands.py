"""Each command of ``flashsvd`` on small models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from flashsvd_compile.cli import app, bench, demo, minilm, model_folder
from flashsvd_compile.cli.comparison import DENSE, EAGER, INDUCTOR, OURS, compare
from flashsvd_compile.compress import LowRankLinear, compress


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    """The message, with the frame and the line breaks taken out that it is printed with."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2, vocab_size=60)
    return BertModel(config).eval()


@pytest.fixture
def folder(tmp_path: Path, bert: BertModel) -> Path:
    bert.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


class TestCompress:
    def test_writes_a_folder_that_loads(self, folder: Path, tmp_path: Path, bert: BertModel):
        output = run("compress", folder, tmp_path / "small", "--keep-ratio", 0.4, "--rank", "*query=5")
        assert "12 layers factored" in output
        loaded = model_folder.load(tmp_path / "small")
        expected = compress(bert, 0.4, ranks={"*query": 5})
        inputs = model_folder.sample_inputs(bert, 2, 10)
        assert torch.equal(loaded(**inputs)[0], expected(**inputs)[0])
        ranks = {module.rank for name, module in loaded.named_modules() if name.endswith("query")}
        assert ranks == {5}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--keep-ratio", 2], "keep_ratio must be between 0 and 1, not 2.0"),
            (["--rank", "query"], "--rank takes PATTERN=RANK, not 'query'"),
            (["--rank", "nowhere=4"], "pattern 'nowhere' fits none"),
        ],
    )
    def test_mistakes_are_named(self, folder: Path, tmp_path: Path, arguments: list, message: str):
        assert message in refused("compress", folder, tmp_path / "small", *arguments)

    def test_no_model_folder(self, tmp_path: Path):
        assert "no config.json" in refused("compress", tmp_path, tmp_path / "small")

    def test_the_dense_models_own_folder_is_not_written_to(self, folder: Path):
        before = sorted(folder.iterdir())
        assert "holds the dense model; write the factored one to another folder" in refused("compress", folder, folder)
        assert sorted(folder.iterdir()) == before

    @pytest.mark.parametrize("out", ["file", "file/below"])
    def test_no_folder_can_be_made(self, folder: Path, tmp_path: Path, out: str):
        (tmp_path / "file").write_text("")
        assert "is no folder that can be made" in refused("compress", folder, tmp_path / out)

    def test_factored_model(self, folder: Path, tmp_path: Path):
        run("compress", folder, tmp_path / "small")
        for arguments in (["compress", tmp_path / "small", tmp_path / "smaller"], ["bench", tmp_path / "small"]):
            assert "fits none of the 0 layers that can be factored" in refused(*arguments)


@pytest.mark.parametrize("command", ["compress", "explain", "bench"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not a valid JSON file"),
        ('{"model_type": "nothing_known"}', "`nothing_known`"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "'hidden_size' expected int"),
        ('{"model_type": "bert", "architectures": ["BertConfig"]}', "'eval'"),
        ('{"model_type": "bert"}', "no file named model.safetensors"),
    ],
)
def test_folders_that_transformers_cannot_load(tmp_path: Path, command: str, config: str, message: str):
    (tmp_path / "config.json").write_text(config)
    output = refused(command, tmp_path, *([tmp_path / "small"] if command == "compress" else []))
    assert "transformers cannot load" in output and message in output


class TestExplain:
    def test_factored_model(self, folder: Path, tmp_path: Path):
        run("compress", folder, tmp_path / "small")
        output = run("explain", tmp_path / "small", "--batch", 2, "--length", 12)
        assert "4 regions rewritten" in output
        assert "encoder.layer.1.attention" in output

    def test_dense_model(self, folder: Path):
        assert "no low-rank projection found" in run("explain", folder)


def test_bench_writes_a_record(folder: Path, tmp_path: Path):
    path = tmp_path / "record.json"
    run("bench", folder, "--batch", 2, "--length", 16, "--samples", 2, "--record", path)
    record = json.loads(path.read_text())
    assert {"device", "versions", "commit", "command", "rows"} == set(record)
    assert [row["implementation"] for row in record["rows"]] == [DENSE, EAGER, INDUCTOR, OURS]
    assert all(row["time_ms"] > 0 and row["peak_bytes"] > 0 and row["samples"] == 2 for row in record["rows"])


@pytest.mark.parametrize("record", ["absent/record.json", "dense"])
def test_bench_refuses_a_record_it_cannot_write_before_it_measures(
    folder: Path, tmp_path: Path, record: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "compare", lambda *_, **__: pytest.fail("measured"))
    output = refused("bench", folder, "--record", tmp_path / record)
    assert ("is no folder that can be written to" if record != "dense" else "is a directory") in output


def test_comparison(bert: BertModel):
    factored = compress(bert)
    inputs = model_folder.sample_inputs(bert, 2, 24)
    rows = compare(bert, factored, lambda model: model(**inputs)[0], torch.device("cpu"), samples=2, warm_ups=0)
    dense, eager, inductor, ours = rows
    assert dense.error > 1e-2
    assert max(eager.error, inductor.error, ours.error) < 1e-5
    assert ours.peak_bytes < eager.peak_bytes


def test_demo_prints_its_table(monkeypatch: pytest.MonkeyPatch):
    """The demo itself, on fewer sentences and a plain, thus quick, compression."""
    all_sentences = minilm.sentences
    monkeypatch.setattr(minilm, "sentences", lambda count, start=0: all_sentences(min(count, 4), start))
    monkeypatch.setattr(demo.console, "width", 100)
    output = run("demo", "--keep-ratio", "0.3")
    for name in (DENSE, EAGER, INDUCTOR, OURS):
        assert name in output
    assert "Rewritten: 6 attention, 6 mlp, 0 linear regions. Left alone: 0 sites." in output


def test_demo_names_a_mistake():
    assert "keep_ratio must be between 0 and 1, not 2.0" in refused("demo", "--keep-ratio", 2)


def test_sample_inputs_of_every_kind_of_model():
    from transformers import T5Config, T5Model, ViTConfig, ViTModel

    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    assert model_folder.sample_inputs(vit, 2, 10)["pixel_values"].shape == (2, 3, 224, 224)
    t5 = T5Model(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50))
    compressed = compress(t5)
    assert any(isinstance(module, LowRankLinear) for module in compressed.modules())
    assert compressed(**model_folder.sample_inputs(t5, 2, 10))[0].shape == (2, 10, 32)
