"""Arguments that do not fit raise an error of this package that names them."""

import pytest
import torch

from flashsvd_compile import ops
from flashsvd_compile.errors import DtypeError, InvalidOptionError, ShapeError

from .regions import attention_arguments, linear_arguments, mlp_arguments

MAKERS = {"linear": linear_arguments, "mlp": mlp_arguments, "attention": attention_arguments}
SIZES = {"linear": (3, 16), "mlp": (3, 16), "attention": ()}


def call(name: str, how: dict | None = None, /, **changes) -> None:
    """Call an operator on a fitting region after replacing some arguments by name."""
    operator = getattr(ops, name)
    names = [argument.name for argument in operator._schema.arguments]
    arguments = dict(zip(names, MAKERS[name](*SIZES[name], **(how or {})), strict=True))
    assert changes.keys() <= arguments.keys()
    operator(**{**arguments, **changes})


SHAPES = [
    ("linear", "w_up", None, "projection"),
    ("linear", "w_down", torch.ones(5, 17), r"w_down is \(5, 17\), expected \(5, 16\)"),
    ("linear", "w_down_bias", torch.ones(6), "w_down_bias"),
    ("linear", "w_up", torch.ones(24, 6), r"w_up is \(24, 6\), expected \(24, 5\)"),
    ("linear", "w_up_bias", torch.ones(1), r"w_up_bias is \(1,\), expected \(24,\)"),
    ("mlp", "hidden_up", None, "projection"),
    ("mlp", "out_up", None, "projection"),
    ("mlp", "gate_up", torch.ones(41, 16), "width of gate is 41, expected 40"),
    ("mlp", "out_down", torch.ones(6, 39), r"out_down is \(6, 39\), expected \(6, 40\)"),
    ("mlp", "residual", torch.ones(16), r"shape of residual is \(16,\), expected \(3, 16\)"),
    ("attention", "residual", torch.ones(1, 7, 32), r"shape of residual is \(1, 7, 32\), expected \(2, 7, 32\)"),
    ("attention", "v_up", None, "projection"),
    ("attention", "x", torch.ones(7, 32), "x and context"),
    ("attention", "context", torch.ones(3, 7, 32), "x and context"),
    ("attention", "num_heads", 0, "num_heads"),
    ("attention", "num_kv_heads", 3, "num_heads is 4, expected a multiple of num_kv_heads=3"),
    ("attention", "out_down", torch.ones(6, 31), "out_down"),
    ("attention", "key_padding", torch.ones(2, 8, dtype=torch.bool), "key_padding"),
    ("attention", "mask", torch.ones(3, 7, dtype=torch.bool), "broadcastable"),
    ("attention", "mask", torch.ones(1, 1, 1, 7, 7, dtype=torch.bool), "broadcastable"),
    ("attention", "cos", torch.ones(1, 7, 4), "both or neither"),
    ("attention", "documents", torch.ones(2, 8, dtype=torch.int), r"shape of documents is \(2, 8\), expected \(2, 7\)"),
]


@pytest.mark.parametrize(("name", "argument", "value", "message"), SHAPES)
def test_shapes(name, argument, value, message):
    with pytest.raises(ShapeError, match=message):
        call(name, **{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("q_up", torch.ones(33, 5), "features of q is 33, expected a multiple of 4 heads"),
        ("k_up", torch.ones(28, 4), "features of k is 28, expected 32"),
        ("v_up", torch.ones(33, 3), "features of v is 33, expected a multiple of 4 heads"),
    ],
)
def test_heads(argument, value, message):
    with pytest.raises(ShapeError, match=message):
        call("attention", {"bias": False}, **{argument: value})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(1, 6, 4), "shape of cos"),
        (torch.ones(3, 7, 4), "shape of cos"),
        (torch.ones(7, 4), "shape of cos"),
        (torch.ones(1, 7, 3), "rotary_dim of cos is 3"),
        (torch.ones(1, 7, 10), "rotary_dim of cos is 10"),
    ],
)
def test_rotation(table, message):
    with pytest.raises(ShapeError, match=message):
        call("attention", cos=table, sin=table)


def test_rotations_of_two_sizes():
    with pytest.raises(ShapeError, match="shape of sin"):
        call("attention", cos=torch.ones(1, 7, 4), sin=torch.ones(1, 7, 2))


def test_documents_of_another_context():
    with pytest.raises(ShapeError, match="length of a context of packed documents is 5, expected 7"):
        call("attention", {"kv_len": 5}, documents=torch.ones(2, 7, dtype=torch.int))


def test_rotation_of_another_context():
    with pytest.raises(ShapeError, match="length of a rotated context is 5, expected 7"):
        call("attention", {"kv_len": 5}, cos=torch.ones(1, 7, 4), sin=torch.ones(1, 7, 4))


DTYPES = [
    ("linear", "w_up", torch.ones(24, 5).double()),
    ("mlp", "out_up_bias", torch.ones(16).half()),
    ("mlp", "residual", torch.ones(3, 16).double()),
    ("attention", "residual", torch.ones(2, 7, 32).half()),
    ("attention", "context", torch.ones(2, 7, 32).half()),
    ("attention", "k_down", torch.ones(4, 32).bfloat16()),
    ("attention", "key_padding", torch.ones(2, 7)),
    ("attention", "documents", torch.ones(2, 7)),
    ("attention", "mask", torch.ones(7, 7).double()),
    ("attention", "mask", torch.ones(7, 7).long()),
]


@pytest.mark.parametrize(("name", "argument", "value"), DTYPES)
def test_dtypes(name, argument, value):
    with pytest.raises(DtypeError, match=f"{argument} has dtype {value.dtype}, expected"):
        call(name, **{argument: value})


def test_dtype_of_the_rotation():
    table = torch.ones(1, 7, 4).double()
    with pytest.raises(DtypeError, match=r"cos has dtype torch\.float64, expected torch\.float32"):
        call("attention", cos=table, sin=table)


@pytest.mark.parametrize("name", MAKERS)
def test_execution(name):
    with pytest.raises(InvalidOptionError, match=r"'strategy' cannot be 'swift'; valid: .*'streamed'"):
        call(name, strategy="swift")
    with pytest.raises(InvalidOptionError, match="'workspace_bytes' cannot be 0"):
        call(name, workspace_bytes=0)


def test_activation():
    with pytest.raises(InvalidOptionError, match="'activation' cannot be 'swish'; valid: gelu, gelu_tanh"):
        call("mlp", activation="swish")


@pytest.mark.parametrize("side", ["window_left", "window_right"])
def test_window(side):
    with pytest.raises(InvalidOptionError, match=f"'{side}' cannot be -2"):
        call("attention", **{side: -2})


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_norm_of_the_input(name):
    with pytest.raises(InvalidOptionError, match="'x_norm' cannot be 'batch'; valid: 'none', 'rms', 'layer'"):
        call(name, x_norm="batch")
    with pytest.raises(InvalidOptionError, match="'x_norm' cannot be 'none'; valid: 'rms' or 'layer' where"):
        call(name, x_norm_weight=torch.ones(16))
    with pytest.raises(ShapeError, match=r"shape of x_norm_bias is \(7,\)"):
        call(name, x_norm="layer", x_norm_bias=torch.ones(7))


def test_norm_of_the_input_of_cross_attention():
    with pytest.raises(InvalidOptionError, match="'x_norm' cannot be 'rms'; valid: 'none' where there is a context"):
        call("attention", {"kv_len": 5}, x_norm="rms")


@pytest.mark.parametrize("role", ["q", "k"])
class TestNorms:
    def test_kind(self, role):
        with pytest.raises(InvalidOptionError, match=f"'{role}_norm' cannot be 'batch'; valid: 'none', 'rms', 'layer'"):
            call("attention", **{f"{role}_norm": "batch"})

    @pytest.mark.parametrize("argument", ["weight", "bias"])
    def test_a_weight_without_a_norm(self, role, argument):
        with pytest.raises(InvalidOptionError, match=f"'{role}_norm' cannot be 'none'"):
            call("attention", **{f"{role}_norm_{argument}": torch.ones(8)})

    @pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
    def test_eps(self, role, eps):
        with pytest.raises(InvalidOptionError, match=f"'{role}_norm_eps' cannot be {eps}; valid: a number not below 0"):
            call("attention", **{f"{role}_norm": "rms", f"{role}_norm_eps": eps})

    @pytest.mark.parametrize("argument", ["weight", "bias"])
    @pytest.mark.parametrize("shape", [(1,), (7,), (8, 4), (1, 8), (2, 8), (4, 1, 8)])
    def test_shape(self, role, argument, shape):
        name = f"{role}_norm_{argument}"
        message = rf"shape of {name} is .*, expected \(8,\), \(4, 8\) or \(32,\)"
        with pytest.raises(ShapeError, match=message):
            call("attention", **{f"{role}_norm": "layer", name: torch.ones(shape)})

    @pytest.mark.parametrize("argument", ["weight", "bias"])
    def test_dtype(self, role, argument):
        name = f"{role}_norm_{argument}"
        with pytest.raises(DtypeError, match=rf"{name} has dtype torch\.bfloat16, expected torch\.float32"):
            call("attention", **{f"{role}_norm": "rms", name: torch.ones(8).bfloat16()})


def test_a_norm_of_grouped_keys_has_their_heads():
    with pytest.raises(ShapeError, match=r"k_norm_weight is \(4, 8\), expected \(8,\), \(2, 8\) or \(16,\)"):
        call("attention", {"num_kv_heads": 2}, k_norm="rms", k_norm_weight=torch.ones(4, 8))


@pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf")])
def test_softcap(softcap):
    with pytest.raises(
        InvalidOptionError, match=f"'softcap' cannot be {softcap}; valid: a positive number, or 0 for no cap"
    ):
        call("attention", softcap=softcap)
