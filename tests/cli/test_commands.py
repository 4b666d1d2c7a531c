"""Each command of ``flashsvd`` on small models."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperModel,
)
from transformers.utils import logging as transformers_logging
from typer import BadParameter
from typer.testing import CliRunner

import flashsvd_compile
from flashsvd_compile import provenance
from flashsvd_compile.cli import app, bench, comparison, demo, minilm, model_folder
from flashsvd_compile.cli.comparison import DENSE, EAGER, INDUCTOR, OURS, Measured, Run, compare, implementations
from flashsvd_compile.cli.inputs import sample_inputs
from flashsvd_compile.compress import LowRankLinear, compress, load_factored, save_factored


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
        inputs = sample_inputs(bert, 2, 10)
        assert torch.equal(loaded(**inputs)[0], expected(**inputs)[0])
        ranks = {module.rank for name, module in loaded.named_modules() if name.endswith("query")}
        assert ranks == {5}

    def test_the_folder_loads_in_python_as_documented(self, folder: Path, tmp_path: Path):
        run("compress", folder, tmp_path / "small")
        dense = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "small"))
        loaded = load_factored(dense, tmp_path / "small" / "factored.safetensors").eval()
        ids = torch.arange(10)[None]
        assert torch.equal(loaded(ids)[0], model_folder.load(tmp_path / "small")(ids)[0])

    def test_loading_draws_no_bar(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        transformers_logging.enable_progress_bar()
        model_folder.load(folder)
        assert "Loading weights" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--keep-ratio", 2], "keep_ratio must be between 0 and 1, not 2.0"),
            (["--rank", "query"], "--rank takes PATTERN=RANK, not 'query'"),
            (["--rank", "*=²"], "--rank takes PATTERN=RANK, not '*=²'"),
            (["--rank", "nowhere=4"], "pattern 'nowhere' fits none"),
        ],
    )
    def test_mistakes_are_named(self, folder: Path, tmp_path: Path, arguments: list, message: str):
        assert message in refused("compress", folder, tmp_path / "small", *arguments)
        assert not (tmp_path / "small").exists()

    def test_what_fails_leaves_a_folder_of_others_as_it_is(self, folder: Path, tmp_path: Path):
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "notes.txt").write_text("")
        refused("compress", folder, tmp_path / "small", "--rank", "nowhere=4")
        assert [file.name for file in (tmp_path / "small").iterdir()] == ["notes.txt"]

    def test_layers_without_weights_are_not_factored(self, folder: Path, tmp_path: Path):
        weights = load_file(folder / "model.safetensors")
        lacking = {name: weight for name, weight in weights.items() if "layer.0.attention.self.query" not in name}
        save_file(
            {n: w for n, w in lacking.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"}
        )
        message = refused("compress", folder, tmp_path / "small")
        assert "the weights lack encoder.layer.0.attention.self.query.bias, encoder.layer.0.attention.sel" in message
        save_file(
            {n: w for n, w in weights.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"}
        )
        run("compress", folder, tmp_path / "small")

    def test_factors_that_transformers_has_saved_are_named(self, tmp_path: Path, bert: BertModel):
        compress(bert).save_pretrained(tmp_path / "small")
        message = refused("explain", tmp_path / "small")
        assert "and 20 more; they are factors, which save_factored writes to factored.safetensors" in message
        save_factored(compress(bert), tmp_path / "small" / "factored.safetensors")
        assert "4 regions rewritten" in run("explain", tmp_path / "small")

    def test_weights_decide_the_dtype_where_the_configuration_does_not(self, tmp_path: Path, bert: BertModel):
        bert.bfloat16().save_pretrained(tmp_path / "dense")
        config = json.loads((tmp_path / "dense" / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
        run("compress", tmp_path / "dense", tmp_path / "small")
        assert model_folder.load(tmp_path / "small").dtype == torch.bfloat16
        (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        assert model_folder.load(tmp_path / "small").dtype == torch.float32

    def test_a_missing_requirement_is_named(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        for arguments in (["compress", folder, tmp_path / "small"], ["bench", "--layers", 1], ["explain", folder]):
            message = refused(*arguments)
            assert "pip install 'flashsvd-compile[bench]' has it" in message
            assert "transformers cannot load" not in message
        assert "pip install 'flashsvd-compile[demo]' has it" in refused("demo")

    def test_no_such_folder(self, tmp_path: Path):
        message = "there is no folder bert-base-uncased; models are read from disk, nothing is downloaded"
        assert message in refused("compress", "bert-base-uncased", tmp_path / "small")

    @pytest.mark.parametrize("command", ["compress", "bench", "demo"])
    @pytest.mark.parametrize("ratio", ["0", "1", "nan"])
    def test_the_ratio_is_checked_before_the_model(self, tmp_path: Path, command: str, ratio: str):
        folders = {"compress": [tmp_path / "absent", tmp_path / "small"], "bench": [tmp_path / "absent"], "demo": []}
        message = f"keep_ratio must be between 0 and 1, not {float(ratio)}"
        assert message in refused(command, *folders[command], "--keep-ratio", ratio)

    def test_ranks_are_read_before_the_model(self, tmp_path: Path):
        assert "--rank takes PATTERN=RANK, not 'query'" in refused(
            "compress", tmp_path / "absent", tmp_path / "small", "--rank", "query"
        )

    def test_layers_left_dense_are_counted(self, folder: Path, tmp_path: Path):
        output = run("compress", folder, tmp_path / "[small]", "--rank", "*query=1000")
        assert "10 layers factored, 2 left dense, 0.1 M parameters before" in output
        assert "[small]" in output

    def test_another_models_folder_is_not_written_to(self, folder: Path, tmp_path: Path):
        other = tmp_path / "other"
        other.mkdir()
        (other / "model.safetensors").write_text("")
        assert "holds another model (model.safetensors); write the" in refused("compress", folder, other)
        assert [file.name for file in other.iterdir()] == ["model.safetensors"]

    def test_another_factored_models_folder_is_not_written_to(self, folder: Path, tmp_path: Path):
        run("compress", folder, tmp_path / "small")
        BertModel(BertConfig(hidden_size=24, intermediate_size=48, num_attention_heads=2)).save_pretrained(folder)
        assert "holds another model (config.json); write the" in refused("compress", folder, tmp_path / "small")

    def test_a_factored_model_is_written_over(self, folder: Path, tmp_path: Path):
        for rank in (4, 5):
            run("compress", folder, tmp_path / "small", "--rank", f"*={rank}")
        loaded = model_folder.load(tmp_path / "small")
        assert {module.rank for module in loaded.modules() if isinstance(module, LowRankLinear)} == {5}

    def test_no_model_folder(self, tmp_path: Path):
        assert "no config.json" in refused("compress", tmp_path, tmp_path / "small")

    def test_the_dense_models_own_folder_is_not_written_to(self, folder: Path):
        before = sorted(folder.iterdir())
        assert "holds the dense model; write the factored one to another folder" in refused("compress", folder, folder)
        assert sorted(folder.iterdir()) == before

    @pytest.mark.parametrize("out", ["file", "file/below"])
    def test_no_folder_can_be_made(self, folder: Path, tmp_path: Path, out: str):
        (tmp_path / "file").write_text("")
        assert "cannot be made a folder" in refused("compress", folder, tmp_path / out)

    def test_factored_model(self, folder: Path, tmp_path: Path):
        run("compress", folder, tmp_path / "small")
        output = refused("compress", tmp_path / "small", tmp_path / "smaller")
        assert "skip leaves out pooler.dense; 12 are low-rank already" in output

    def test_all_but_the_weights_is_copied(self, folder: Path, tmp_path: Path):
        kept = ["chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling.py", "vocabulary.tiktoken"]
        weights = ["model.safetensors.index.json", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/a.json"]
        hidden = [".git/config", ".cache/a.json", "__pycache__/modeling.pyc", ".gitattributes"]
        for name in (*kept, *weights, *hidden):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        run("compress", folder, tmp_path / "small")
        written = {str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*.*")}
        assert written == {*kept, "config.json", model_folder.FACTORED_WEIGHTS}

    def test_a_folder_within_the_dense_models_is_not_copied_into_itself(self, folder: Path):
        run("compress", folder, folder / "runs" / "small")
        assert sorted(path.name for path in (folder / "runs").rglob("*")) == [
            "config.json",
            model_folder.FACTORED_WEIGHTS,
            "small",
        ]


@pytest.mark.parametrize("command", ["compress", "explain", "bench"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not a valid JSON file"),
        ('{"model_type": "nothing_known"}', "`nothing_known`"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "'hidden_size' expected int"),
        ('{"model_type": "bert", "architectures": ["BertConfig"]}', "'BertConfig' is not a model"),
        ('{"model_type": "bert", "architectures": ["pipeline"]}', "'pipeline' is not a model"),
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
        output = run("explain", folder)
        assert "no low-rank projection found" in output and "run `flashsvd compress` first" in output

    def test_factored_model_is_not_to_be_compressed(self, folder: Path, tmp_path: Path):
        run("compress", folder, tmp_path / "small")
        assert "flashsvd compress" not in run("explain", tmp_path / "small", "--batch", 2, "--length", 12)


def test_version():
    printed = dict(line.split() for line in run("--version").splitlines())
    assert printed == {"flashsvd-compile": flashsvd_compile.__version__, **provenance.versions()}
    assert {"python", "torch", "triton"} < set(printed)


def test_help_says_what_the_command_does():
    assert "Run SVD-compressed transformers in a fraction of the activation memory." in run("--help")


def test_bench_writes_a_record(folder: Path, tmp_path: Path):
    path = tmp_path / "record.json"
    run("bench", folder, "--batch", 2, "--length", 16, "--samples", 2, "--record", path)
    record = json.loads(path.read_text())
    assert {"device", "versions", "commit", "command", "rows"} == set(record)
    assert [row["implementation"] for row in record["rows"]] == [DENSE, EAGER, INDUCTOR, OURS]
    assert all(row["time_ms"] > 0 and row["peak_bytes"] > 0 and row["samples"] == 2 for row in record["rows"])


def test_bench_measures_a_factored_model_as_it_is(folder: Path, tmp_path: Path):
    run("compress", folder, tmp_path / "small", "--rank", "*=5")
    path = tmp_path / "record.json"
    output = run("bench", tmp_path / "small", "--batch", 2, "--length", 16, "--samples", 2, "--record", path)
    rows = json.loads(path.read_text())["rows"]
    assert [row["implementation"] for row in rows] == [EAGER, INDUCTOR, OURS]
    assert all(row["error"] < 1e-5 for row in rows)
    assert DENSE not in output


@pytest.mark.parametrize("record", ["absent/record.json", "dense"])
def test_bench_refuses_a_record_it_cannot_write_before_it_measures(
    folder: Path, tmp_path: Path, record: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "compare", lambda *_, **__: pytest.fail("measured"))
    output = refused("bench", folder, "--record", tmp_path / record)
    assert ("is not a folder that can be written to" if record != "dense" else "is a directory") in output


def test_bench_refuses_a_record_on_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "compare", lambda *_, **__: [])
    assert "--record cannot be /dev/full" in refused("bench", folder, "--record", "/dev/full")


def test_bench_refuses_what_says_nothing_of_the_model(folder: Path, tmp_path: Path):
    run("compress", folder, tmp_path / "small", "--rank", "*=5")
    assert "--layers is of BERT-base's shape" in refused("bench", folder, "--layers", 3)
    assert "--keep-ratio is of dense weights" in refused("bench", tmp_path / "small", "--keep-ratio", 0.5)


def test_comparison(bert: BertModel):
    factored = compress(bert)
    inputs = sample_inputs(bert, 2, 24)
    rows = compare(bert, factored, lambda model: model(**inputs)[0], torch.device("cpu"), samples=2, warm_ups=0)
    dense, eager, inductor, ours = rows
    assert dense.error > 1e-2
    assert max(eager.error, inductor.error, ours.error) < 1e-5
    assert ours.peak_bytes < eager.peak_bytes


class TestReduceOverhead:
    """What is recommended on a GPU is measured there; a CPU has no CUDA graphs."""

    NAMES = (f"{INDUCTOR} reduce-overhead", f"{OURS} reduce-overhead")

    def test_has_rows_on_a_gpu(self, bert: BertModel, monkeypatch: pytest.MonkeyPatch):
        calls: list[dict[str, Any]] = []
        monkeypatch.setattr(torch, "compile", lambda model, **how: calls.append(how) or model)
        assert tuple(implementations(bert, bert, "cuda")) == (DENSE, EAGER, INDUCTOR, OURS, *self.NAMES)
        assert [how.get("mode") for how in calls] == [None, None, "reduce-overhead", "reduce-overhead"]
        assert [how.get("backend") for how in calls] == [None, "flashsvd", None, "flashsvd"]

    def test_has_none_on_a_cpu(self, bert: BertModel):
        assert tuple(implementations(None, bert, "cpu")) == (EAGER, INDUCTOR, OURS)

    def test_memory_is_that_of_the_same_code_without_a_graph(self, bert: BertModel, monkeypatch: pytest.MonkeyPatch):
        factored = compress(bert)
        monkeypatch.setattr(
            comparison, "implementations", lambda *_: dict.fromkeys((EAGER, INDUCTOR, OURS, *self.NAMES), factored)
        )
        measured: list[object] = []
        monkeypatch.setattr(
            comparison.measure, "peak_activation_bytes", lambda *_: measured.append(None) or len(measured)
        )
        inputs = sample_inputs(bert, 2, 10)
        rows = compare(None, factored, lambda model: model(**inputs)[0], torch.device("cpu"), samples=1, warm_ups=0)
        assert [row.peak_bytes for row in rows] == [1, 2, 3, 2, 3]


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


class TestSampleInputs:
    SIZES: ClassVar[dict[str, Any]] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }

    def whisper(self) -> Any:
        config = WhisperConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=20,
            vocab_size=50,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        return WhisperModel(config).eval()

    def wav2vec2(self) -> Any:
        convolutions: dict[str, Any] = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4)}
        positions: dict[str, Any] = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
        return Wav2Vec2Model(Wav2Vec2Config(**self.SIZES, **convolutions, **positions)).eval()

    def test_pixels(self):
        vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
        assert sample_inputs(vit, 2, 10)["pixel_values"].shape == (2, 3, 224, 224)

    def test_encoder_and_decoder(self):
        t5 = T5Model(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50))
        compressed = compress(t5)
        assert any(isinstance(module, LowRankLinear) for module in compressed.modules())
        assert compressed(**sample_inputs(t5, 2, 10))[0].shape == (2, 10, 32)

    def test_spectrogram(self):
        inputs = sample_inputs(self.whisper(), 2, 10)
        assert {name: value.shape for name, value in inputs.items()} == {
            "input_features": (2, 8, 32),
            "decoder_input_ids": (2, 10),
        }

    def test_waveform(self):
        model = self.wav2vec2().bfloat16()
        inputs = sample_inputs(model, 2, 10)
        assert inputs["input_values"].dtype == torch.bfloat16
        assert model(**inputs).last_hidden_state.shape == (2, 10, 32)

    def test_pictures_with_texts(self):
        vision = {**self.SIZES, "image_size": 16, "patch_size": 8}
        clip = CLIPModel(CLIPConfig(text_config=self.SIZES, vision_config=vision, projection_dim=8)).eval()
        inputs = sample_inputs(clip, 2, 10)
        assert inputs["input_ids"].shape == (2, 10) and inputs["pixel_values"].shape == (2, 3, 16, 16)

    def test_texts_alone_where_a_token_stands_for_a_picture(self):
        vision = {**self.SIZES, "image_size": 16, "patch_size": 8}
        config = Gemma3Config(text_config={**self.SIZES, "head_dim": 16}, vision_config=vision, image_token_index=3)
        inputs = sample_inputs(Gemma3ForConditionalGeneration(config).eval(), 2, 10)
        assert set(inputs) == {"input_ids", "attention_mask"}

    def test_kind_of_input_that_is_not_known(self):
        model = self.wav2vec2()
        model.main_input_name = "past_values"
        with pytest.raises(BadParameter, match="no inputs can be made for Wav2Vec2Model: its main input is 'past_val"):
            sample_inputs(model, 2, 10)

    def test_size_that_the_configuration_lacks(self):
        model = self.wav2vec2()
        model.main_input_name = "input_features"
        with pytest.raises(BadParameter, match=r"no input_features can be made for Wav2Vec2Model.*'num_mel_bins'"):
            sample_inputs(model, 2, 10)

    def test_length_beyond_the_decoders_positions(self):
        with pytest.raises(BadParameter, match=r"WhisperModel cannot run --length 21 .*max_target_positions 20"):
            sample_inputs(self.whisper(), 2, 21)

    @pytest.mark.parametrize("command", ["explain", "bench"])
    def test_length_beyond_the_positions(self, folder: Path, command: str):
        output = refused(command, folder, "--length", 513)
        assert "BertModel cannot run --length 513 (input_ids [4, 513]" in output
        assert "its configuration states max_position_embeddings 512" in output

    def test_bench_runs_waveforms_in_float64(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def run_in_float64(dense: nn.Module, factored: nn.Module, run: Run, *_: object, **__: object) -> list[Measured]:
            assert run(factored.double()).dtype == torch.float64
            return []

        monkeypatch.setattr(bench, "compare", run_in_float64)
        self.wav2vec2().save_pretrained(tmp_path / "wav2vec2")
        run("bench", tmp_path / "wav2vec2", "--batch", 2, "--length", 10)
