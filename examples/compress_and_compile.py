"""Compress a model, see what would be rewritten, compile, compare: ``python examples/compress_and_compile.py``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch loads: its profiler announces every start and stop

import torch
from transformers import BertConfig, BertModel

import flashsvd_compile as fsvd
from flashsvd_compile import measure

torch.manual_seed(0)
model = BertModel(BertConfig(num_hidden_layers=2), add_pooling_layer=False).eval()
ids = torch.randint(30522, (4, 128))
mask = torch.ones_like(ids)
mask[:, 100:] = 0

model = fsvd.compress(model, keep_ratio=0.5)
fast = torch.compile(model, backend="flashsvd")

with torch.no_grad():
    print(fsvd.explain(model, input_ids=ids, attention_mask=mask))
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    result = fast(input_ids=ids, attention_mask=mask).last_hidden_state
    print(f"difference from the unfused model: {measure.relative_error(result, expected):.1e}")
    for name, each in (("eager", model), ("flashsvd", fast)):
        call = lambda each=each: each(input_ids=ids, attention_mask=mask)  # noqa: E731
        peak = measure.peak_activation_bytes(call, ids.device)
        print(f"{name}: {peak / 2**20:.1f} MiB of peak activation memory")
