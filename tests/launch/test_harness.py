"""Tasks of lm-evaluation-harness on vendored text; needs the packages of `tests/compared.txt`."""

import json
import lzma
from pathlib import Path

import jax
import numpy as np
import pytest
from small_lm import train_small

import shampax
from shampax.framework.generation.scoring import Scorer
from shampax.launch import generate, trained
from shampax.launch.evaluate import main

SAMPLE = Path(shampax.__file__).parent / "framework" / "data" / "samples" / "enwiki-106.txt.xz"

TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "surprise": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{text[20:]}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.mark.slow
def test_tasks_made_of_vendored_text(tmp_path, capsys, monkeypatch):
    """Faults: contexts or continuations are shifted or cut wrongly; results are in another order; stops are ignored."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train_small(tmp_path / "w")
    text = lzma.decompress(SAMPLE.read_bytes()).decode()[2_000:3_000]
    text = "".join(c for c in text if c.isascii() and c.isprintable())
    cuts = [f"{text[start : start + 39]}." for start in range(0, 320, 40)]
    rows = [{"text": cut, "choices": [cuts[i - 1][:9], cuts[i - 2][:9]]} for i, cut in enumerate(cuts)]
    (tmp_path / "prompts").write_text("".join(f"{json.dumps({'prompt': cut[20:]})}\n" for cut in cuts))
    flags = f"--prompts={tmp_path / 'prompts'}", "--temperature=0", "--max_tokens=5", "--stop=\n"
    assert generate.main([f"--workdir={tmp_path / 'w'}", *flags]) == 0
    written = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    lines = [json.dumps(row | {"written": words}) for row, words in zip(rows, written, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    for name, task in TASKS.items():
        common = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(common + files + task)
    flags = f"--harness={','.join(TASKS)}", f"--harness_tasks={tmp_path}", "--json", "--config.mesh.tensor=2"
    assert main([f"--workdir={tmp_path / 'w'}", *flags]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{\n") :])

    model = trained.find(tmp_path / "w", "best", "", [trained.LM], [trained.TEXT])
    codec = model.codec()
    begin = codec.encode("")
    tokens = [codec.encode(cut)[len(begin) :] for cut in cuts]
    with jax.set_mesh(model.mesh):
        variables, scorer = model.variables(), Scorer(model.task, model.mesh, 8)
        pairs = [
            (codec.encode(row["text"])[-23:], codec.encode(f" {choice}")[len(begin) :])
            for row in rows
            for choice in row["choices"]
        ]
        chosen = np.array([score.nats for score in scorer.scores(variables, pairs)]).reshape(-1, 2).argmax(axis=1)
        parts = [pair for each in tokens for pair in ((begin, each[:32]), (each[7:32], each[32:]))]
        surprise = -sum(score.nats for score in scorer.scores(variables, parts)) / sum(map(len, tokens))
    assert found["choose"]["acc,none"] == pytest.approx((chosen == 0).mean())
    assert 0 < (chosen == 0).mean() < 1
    assert found["surprise"]["byte_perplexity,none"] == pytest.approx(np.exp(surprise), rel=1e-4)
    assert found["write"]["exact_match,none"] == 1

    unknown = main([f"--workdir={tmp_path / 'w'}", "--harness=no_such_task"])
    assert (unknown, "there is no task 'no_such_task'" in capsys.readouterr().err) == (2, True)
