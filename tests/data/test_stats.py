import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from xlam_jax import config as configs
from xlam_jax.data import corpus, pipeline, render_sources, stats
from xlam_jax.data.mixture import shares
from xlam_jax.data.parse import read_jsonl
from xlam_jax.data.render import render
from xlam_jax.data.tokenizer import load_tokenizer
from xlam_jax.enums import SPAN_KINDS

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Two bundled sources in rows too short for some, and a third with an invalid line."""
    folder = tmp_path_factory.mktemp("stats")
    hammer = (QUICKSTART / "hammer.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "short.jsonl").write_text("\n".join([*hammer[:60], "[1]", '{"conversation": []}']), encoding="utf-8")
    path = folder / "c.yaml"
    path.write_text(
        f"extends: {ROOT}/configs/quickstart.yaml\n"
        f"model: {{config: {ROOT}/configs/models/tiny_mixtral.json}}\n"
        f"data:\n  tokenizer: {QUICKSTART}/tokenizer\n  loss: {{thought: 0.5}}\n  streams: 4\n"
        "  on_invalid: drop\n  sequence_length: 640\n  sources:\n"
        f"    - {{name: webshop, files: [{QUICKSTART}/webshop.jsonl]}}\n"
        f"    - {{name: hotpotqa, files: [{QUICKSTART}/hotpotqa.jsonl], weight: 2.5}}\n"
        f"    - {{name: short, files: [{folder}/short.jsonl], weight: 3}}\n"
        "train: {batch_size: 8, steps: 100, warmup_steps: 1}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def collected(config) -> stats.Stats:
    return stats.collect(config)


def test_counts_what_is_there(config, collected):
    """Counted again, row by row, from the files."""
    data = configs.load(config).config.data
    tokenizer = load_tokenizer(data.tokenizer)
    for source, counted in zip(data.sources, collected.sources, strict=True):
        counts: Counter[str] = Counter()
        lengths, weighted = [], 0.0
        kinds = np.zeros(len(SPAN_KINDS), int)
        for _, row in read_jsonl(source.files[0]):
            if isinstance(row, Exception):
                counts[row.reason] += 1
                continue
            rendered = render(row, tokenizer, data.format, data.loss)
            if len(rendered.input_ids) > data.sequence_length + 1:
                counts["too-long"] += 1
            elif render_sources.is_heldout(source.name, row.id, data.heldout):
                counts["heldout"] += 1
            else:
                counts["trajectories"] += 1
                counts["turns"] += len(row.conversation)
                counts["calls"] += sum(len(turn.tool_calls) for turn in row.conversation)
                counts["trained"] += int(rendered.loss_mask.sum())
                weighted += float(rendered.weights.sum())
                lengths.append(len(rendered.input_ids) - 1)
                for span in rendered.spans:
                    kinds[SPAN_KINDS.index(span.kind)] += span.end - span.start
        kinds[SPAN_KINDS.index("prompt")] -= len(lengths)  # the first token is nobody's label
        dropped = {key: counts[key] for key in ("too-long", "not-an-object", "no-conversation") if counts[key]}
        assert counted.name == source.name
        assert counted.dropped == dropped
        for key in ("trajectories", "heldout", "turns", "calls", "trained"):
            assert getattr(counted, key) == counts[key], key
        assert counted.lengths.tolist() == lengths
        assert counted.tokens == sum(lengths)
        assert counted.weighted == pytest.approx(weighted)
        assert counted.kinds.tolist() == kinds.tolist()
    assert collected.sources[0].dropped["too-long"] > 0
    assert collected.sources[2].dropped == {"not-an-object": 1, "no-conversation": 1}


def test_shares_and_packing_are_those_of_the_rows_that_training_reads(config, collected):
    run = configs.load(config).config
    tokenizer = load_tokenizer(run.data.tokenizer)
    loaded = corpus.load(run.data, tokenizer)
    loader = pipeline.Loader(loaded, run.data, batch_size=8, seed=run.seed, tokenizer=tokenizer)
    batches = [next(loader) for _ in range(-(-collected.rows // 8))]
    rows = [row for batch in batches for row in zip(*batch[:5], strict=True)][: collected.rows]
    assert collected.rows == -(-sum(one.tokens for one in collected.sources) // 640)
    assert collected.filled.tolist() == [int((row[4] > 0).sum()) for row in rows]
    assert collected.efficiency == pytest.approx(collected.filled.sum() / (640 * collected.rows))
    drawn_trained = np.sum([one.drawn_trained for one in collected.sources], axis=0)
    drawn = np.sum([one.drawn for one in collected.sources], axis=0)
    assert drawn_trained.tolist() == [int((row[2] > 0).sum()) for row in rows]
    assert drawn.tolist() == [int(row[4].max()) for row in rows]
    targets = [float(share) for share in shares(loaded, run.data)]
    assert [one.target for one in collected.sources] == pytest.approx(targets)
    # what waits in the packer's bins is all that keeps the drawn from the target
    waiting = run.data.streams * run.data.packing_bins * 4
    drawn = sum(int(one.drawn.sum()) for one in collected.sources)
    assert np.abs(collected.realised("drawn") - targets).max() < waiting / drawn
    trained = [one.trained / len(one.lengths) * one.target for one in collected.sources]
    assert [one.target_trained for one in collected.sources] == pytest.approx(np.array(trained) / sum(trained))


def test_more_rows_come_nearer_to_the_target(config, collected):
    more = stats.collect(config, rows=4 * collected.rows)
    assert more.rows == 4 * collected.rows
    targets = [one.target for one in more.sources]
    assert np.abs(more.realised("drawn") - targets).max() < 0.01
    targets = [one.target_trained for one in more.sources]
    assert np.abs(more.realised("drawn_trained") - targets).max() < 0.02


def test_a_split_trajectory_is_counted_once(config):
    parts = stats.collect(config, ["data.on_long=split"], rows=8).sources[0]
    assert parts.changed["split"] > 0
    assert parts.dropped == {}
    assert len(parts.lengths) > parts.trajectories
    whole = stats.collect(config, ["data.sequence_length=1024"], rows=8).sources[0]
    assert (parts.trajectories, parts.turns, parts.calls) == (whole.trajectories, whole.turns, whole.calls)


def test_augmentation_can_be_looked_at(config):
    result = stats.collect(config, ["data.augment.tools=true", "data.augment.negatives=0.3"], rows=40)
    assert result.sources[2].drawn.sum() > result.sources[0].drawn.sum() > 0


def test_pairs_are_counted_with_both_sides(config):
    path = ROOT / "examples" / "dpo" / "hotpotqa.jsonl"
    overrides = [
        f"data.sources=[{{name: pairs, files: [{path}], format: pairs}}]",
        "objective.kind=sigmoid",
        "data.loss.thought=1",
        "data.sequence_length=1024",
    ]
    result = stats.collect(config, overrides, rows=16)
    (one,) = result.sources
    run = configs.load(config, overrides).config
    (loaded,) = corpus.load(run.data, load_tokenizer(run.data.tokenizer))
    assert one.trajectories == len(one.lengths) == len(loaded.train)
    assert one.trajectories + one.heldout == 30
    trained = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    trained = [row for row in trained if row["unique_trajectory_id"] in set(loaded.ids)]
    assert one.turns == sum(2 * len(row["conversation"]) + len(row["chosen"]) + len(row["rejected"]) for row in trained)
    assert one.trained == sum(int((example["weights"] > 0).sum()) for example in loaded.train)
    assert one.kinds.sum() == one.tokens
    loader = pipeline.Loader(loaded=[loaded], data=run.data, batch_size=8, seed=run.seed)
    batches = [next(loader), next(loader)]
    assert one.drawn.tolist() == [int(row.max()) // 2 for batch in batches for row in batch.segments]
    assert re.search(r"^  source +pairs +held out", stats.table(result), re.MULTILINE)


def test_the_table_says_it_all_in_narrow_lines(collected):
    text = stats.table(collected)
    for one in collected.sources:
        line = next(line for line in text.splitlines() if line.startswith(f"  {one.name} "))
        assert f"{one.trajectories:,}" in line
        assert f"{one.tokens:,}" in line
    assert f"{collected.efficiency:.2%} of the places in {collected.rows} rows" in text
    assert re.search(r"short: dropped 1 not-an-object, 1 no-conversation", text)
    assert max(map(len, text.splitlines())) <= 120


def test_the_page_is_whole_and_loads_nothing(collected, tmp_path):
    out = tmp_path / "stats.html"
    stats.write_page(collected, out)
    page = out.read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 4
    assert page.count("<table>") == 3
    assert page.rstrip().endswith("</html>")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!["']?#)|@import|<script|<link""", page)
    assert {link for link in re.findall(r"https?://[^\s\"'<]+", page)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["stats.html"]


def test_hostile_names_are_shown_as_text(collected, tmp_path):
    hostile = "</svg><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;"
    sources = [source._replace(name=f"{source.name} {hostile}") for source in collected.sources]
    sources[0] = sources[0]._replace(dropped=Counter({hostile: 3}))
    out = tmp_path / "stats.html"
    stats.write_page(collected._replace(config=hostile, sources=sources), out)
    page = out.read_text(encoding="utf-8")
    assert not re.findall("<script|<img", page)
    assert page.count("<svg") == page.count("</svg>") == 4
    assert page.count("&lt;img src=x onerror=alert(2)&gt;&amp;lt;") > 12
