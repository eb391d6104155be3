"""The script behind the figures of prefill: on a tiny model and a short text it writes what it says."""

import json

import measure_prefill
import torch


def test_prefill_is_compared_with_dense_on_the_same_tokens_and_rows_are_kept(tmp_path, subword_model):
    out, text = tmp_path / "prefill.json", tmp_path / "text.txt"
    text.write_text("".join(f"{number * number} sheep. " for number in range(400)))
    arguments = ["--model", subword_model, "--texts", str(text), "--lengths", "1100", "--tasks", "perplexity"]
    arguments += ["--stretches", "1", "--out", str(out)]
    measure_prefill.main([*arguments, "--settings", "dense"])
    (dense,) = json.loads(out.read_text())["rows"]
    measure_prefill.main([*arguments, "--settings", "dense", "dense_below 0", "window"])
    record = json.loads(out.read_text())
    assert record["rows"][0] == dense
    assert [row["settings"] for row in record["rows"]] == ["dense", "dense_below 0", "window"]
    assert dense["attended"] == 1 > record["rows"][1]["attended"]
    assert record["command"].startswith("python scripts/")
    assert {"commit", "versions", "hardware", "texts"} <= record.keys()
    # A stretch begins with the passage that recall scores at its end.
    ids, scored = measure_prefill.sample_of(torch.arange(600), "recall")
    assert scored == 256
    assert torch.equal(ids[0], torch.cat([torch.arange(344), torch.arange(256)]))
