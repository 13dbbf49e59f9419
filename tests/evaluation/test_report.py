"""The report shows every row and every picture it names is there."""

from __future__ import annotations

import re

import matplotlib.image
import pytest

from kvsculpt_vllm.evaluation.report import write_report
from kvsculpt_vllm.evaluation.run import COLUMNS


@pytest.fixture
def rows():
    settings = {"model": "tiny", "text": "<b>.txt", "effort": "balanced"}

    def row(method, budget, ratio, kl):
        heads = {name: [0.5, 0.1, 0.0, 2.0] for name in ("difficulty", "entries", "error")}
        trace = [[1.0, 1.1], [0.5, 0.7]] if method == "sculpt" else [[1.0, 1.1]]
        numbers = dict.fromkeys(COLUMNS, 1.25)
        chosen = {"method": method, "budget": budget, "keep_ratio": ratio, "kl_mean": kl}
        return numbers | chosen | {"heads": heads, "trace": trace, "settings": settings}

    return [
        row(method, "adaptive", ratio, kl / 7)
        for method, kl in (("select", 0.4), ("sculpt", 0.1))
        for ratio in (0.3, 1.0)
    ]


def test_the_page_has_all_rows_and_its_pictures(rows, tmp_path):
    page = write_report(tmp_path / "report", rows, COLUMNS, num_kv_heads=2)
    text = page.read_text()
    assert text.count("<tr>") == 1 + len(rows)
    assert "<b>.txt" not in text and "&lt;b&gt;.txt" in text
    pictures = re.findall(r'src="([^"]+)"', text)
    assert pictures == ["kl.png"] + [
        f"{kind}-sculpt-adaptive-{r}.png" for r in ("0.3", "1") for kind in ("heads", "convergence")
    ]
    for name in pictures:
        picture = matplotlib.image.imread(page.parent / name)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.01


def test_a_method_without_any_error_is_left_out_of_the_logarithmic_plot(rows, tmp_path):
    exact = [row | {"kl_mean": 0.0} for row in rows]
    assert write_report(tmp_path, exact, COLUMNS, num_kv_heads=1).is_file()
