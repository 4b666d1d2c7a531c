"""The page of regions rewritten, made for two families."""

from benchmarks.coverage import as_markdown, measure
from benchmarks.zoo import FAMILIES


def test_the_page_counts_regions_and_names_reasons():
    rows = [measure(FAMILIES[name], inner="eager") for name in ("BERT", "StableLM")]
    lines = as_markdown(rows, inner="eager").splitlines()
    bert, stablelm = (next(line for line in lines if line.startswith(f"| {name} ")) for name in ("BERT", "StableLM"))
    assert bert.startswith("| BERT | 2/2 | 2/2 | 0 | 0 | ")
    assert stablelm.startswith("| StableLM | 0/2 | 2/2 | 8 | 0 | ")
    left_alone = lines[lines.index("## Left alone") :]
    assert any(
        line.startswith("- StableLM, `layers.0.self_attn` (and 1 more): unsupported_attention") for line in left_alone
    )
    assert not any("BERT" in line for line in left_alone)
