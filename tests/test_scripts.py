"""Scripts that measure: on a tiny model and a short text they write what they say."""

import json

import measure_cpu
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


def test_recall_scores_the_passage_that_a_stretch_begins_with():
    ids, scored = measure_prefill.sample_of(torch.arange(600), "recall")
    assert scored == 256
    assert torch.equal(ids[0, -256:], torch.arange(256))
    assert torch.equal(ids[0, :344], torch.arange(344))


def test_times_on_a_cpu_are_written_beside_those_of_dense_attention(tmp_path, subword_model):
    out = tmp_path / "cpu.json"
    out.write_text('{"steps": {"8": {"dense": 1}}}')
    few = ["--context", "8", "--lengths", "--parts", "prompts", "--dtype", "bfloat16"]
    measure_cpu.main(["--model", subword_model, *few, "--out", str(out)])
    record = json.loads(out.read_text())
    assert (record["steps"], record["bfloat16"]) == ({"8": {"dense": 1}}, {"prompts": {}})
    sizes = ["--keys", "2048", "--context", "1030", "--lengths", "1040", "--repeats", "1"]
    measure_cpu.main(["--model", subword_model, *sizes, "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["bfloat16"] == {"prompts": {}}
    assert list(record["steps"]["1030"]) == list(measure_cpu.STEPS)
    assert list(record["prompts"]["1040"]) == list(measure_cpu.PROMPTS)
    assert {"topk with means", "topk", "block"} < record["operator"]["2048"].keys()
    assert all(record["track"][phase][name] > 0 for phase in ("prompt", "decoding") for name in measure_cpu.TRACKED)
    for part in ("operator", "steps", "prompts"):
        (found,) = record[part].values()
        dense = next(iter(found.values()))["seconds"]
        assert [each["over_dense"] for each in found.values()] == [each["seconds"] / dense for each in found.values()]
