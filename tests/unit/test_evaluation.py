"""From samples to figures by brute force; the file of samples: whole, cut, damaged, of another evaluation."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_jq.errors import UserError
from megatron_jq.evaluate.drawing import answer_of
from megatron_jq.evaluate.judging import Answer, Interval, Judge, Metric, judge_prompt, read_metrics
from megatron_jq.evaluate.report import results_of, table, write_results
from megatron_jq.evaluate.samples import Header, Sample, SampleFile, read_header, read_samples

HEADER = Header(
    source="here/iter_0000007",
    data_source="a.jsonl",
    data_format="jsonl",
    weights="w",
    data="d",
    checkpoint_step=7,
    dtype="float32",
    num_prompts=3,
    num_samples=4,
    temperature=1.0,
    seed=5,
    rationale_budget=2,
    answer_budget=3,
    match="exact",
    rule="none",
)
#: Prompt → (gold answers, sampled answers); "…" marks one that was cut off.
DRAWN = (
    (("red", "RED"), ("red", "blue", "RED", "blue")),
    (("10",), ("10.0", "it is 10", "10…", "10 kg")),
    (("x",), ("y\u2028", "z", "z", "y\n")),
)


def sample(prompt: int, number: int) -> Sample:
    golds, answers = DRAWN[prompt]
    text = answers[number]
    cut = text.endswith("…")
    ids = tuple(range(number + 1))
    log_w = -1.0 - number
    return Sample(
        prompt, prompt, number, "z", (8, 9, 4), number == 3, text.rstrip("…"), ids, not cut, golds, log_w, False
    )


PROMPTS = [[sample(prompt, number) for number in range(4)] for prompt in range(3)]


def right(judge: Judge) -> list[list[bool]]:
    return [list(judge_prompt([s.drawn for s in samples], samples[0].golds, judge).right) for samples in PROMPTS]


def test_answers_are_judged_by_match_and_rule():
    false, true = False, True
    assert right(Judge()) == [[true, false, true, false], [false] * 4, [false] * 4]
    assert right(Judge("exact", "text")) == [[true, false, true, false], [false] * 4, [false] * 4]
    assert right(Judge("exact", "number")) == [[true, false, true, false], [true, false, false, true], [false] * 4]
    # an answer that was cut off counts where it is enough that it holds the gold one
    assert right(Judge("substring", "none")) == [[true, false, true, false], [true] * 4, [false] * 4]


def brute_force_majority(votes: list, golds_right, k: int) -> bool:
    """The winner among those with most votes is the one whose first vote came first."""
    first_votes = votes[:k]
    most = max(first_votes.count(vote) for vote in first_votes)
    return golds_right(next(vote for vote in first_votes if first_votes.count(vote) == most))


@given(st.lists(st.sampled_from("abAB "), min_size=1, max_size=7), st.sampled_from(["a", "b", "c"]))
def test_the_figures_of_a_prompt_are_those_of_all_its_subsets_and_votes(texts, gold):
    judged = judge_prompt([Answer(text, True) for text in texts], [gold], Judge("exact", "text"))
    folded = [text.strip().lower() for text in texts]
    for k in range(1, len(texts) + 1):
        subsets = list(itertools.combinations(folded, k))
        passing = sum(gold in subset for subset in subsets)
        assert judged.value(Metric("pass", k)) == pytest.approx(passing / len(subsets))
        assert judged.value(Metric("maj", k)) == brute_force_majority(folded, gold.__eq__, k)


#: (rule, gold answers, answers that the judge holds equal to them, answers that it holds equal to another)
SAME = (
    (
        "number",
        ("18",),
        ("18", "$18", "18 apples", "18.0", "**18**", "\\boxed{18}", "18 dollars"),
        ("20", "20.0", "$20"),
    ),
    ("number", ("5 kg",), ("5", "5 kg", "5 kilograms", "**5.0 kg**"), ("7", "7 kg", "7.0 kg")),
    ("number", ("yes",), ("yes", "Yes.", "**YES**"), ("20", "$20")),
    (
        "squad",
        ("Kennedy", "John F. Kennedy", "JFK"),
        ("kennedy", "the John F Kennedy", "JFK!"),
        ("Nixon", "the nixon!"),
    ),
    ("none", ("red", "RED"), ("red", "RED", " red"), ("blue", "blue ")),
)


@pytest.mark.parametrize(
    ("rule", "golds", "same", "other"), SAME, ids=[f"{rule} {golds[0]}" for rule, golds, *_ in SAME]
)
@pytest.mark.parametrize("match", ("exact", "substring"))
@given(data=st.data())
@settings(max_examples=25)
def test_answers_that_the_judge_holds_equal_are_one_vote(rule, golds, same, other, match, data):
    texts = data.draw(st.lists(st.sampled_from((*same, *other)), min_size=1, max_size=9))
    judged = judge_prompt([Answer(text, True) for text in texts], golds, Judge(match, rule))
    is_right = [text in same for text in texts]
    assert list(judged.right) == is_right
    for k in range(1, len(texts) + 1):
        # two classes, right and wrong: a tie is the first answer's
        votes = sum(is_right[:k])
        expected = votes * 2 > k or (votes * 2 == k and is_right[0])
        assert judged.value(Metric("maj", k)) == expected, texts


def test_five_ways_to_say_it_win_over_one():
    judged = judge_prompt(
        [Answer(t, True) for t in ("20", "20", "$18", "18 apples", "18")], ["18"], Judge("exact", "number")
    )
    assert (judged.value(Metric("pass", 1)), judged.value(Metric("maj", 5))) == (0.6, 1)


def test_an_unfinished_answer_votes_for_itself_under_exact_match():
    answers = [Answer("a", False), Answer("a", False), Answer("a", True)]
    assert judge_prompt(answers, ["a"], Judge()).value(Metric("maj", 3)) == 0
    assert judge_prompt(answers, ["a"], Judge("substring")).value(Metric("maj", 3)) == 1


class WordTokenizer:
    """Ids 0 to 3 are control tokens; 4 and up spell letters."""

    pad_id, eos_id, think_open_id, think_close_id = range(4)
    control_ids = frozenset(range(4))

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 4) for i in ids if i > 3)


@pytest.mark.parametrize(
    ("ids", "text", "ended"),
    (
        ((4, 5, 1), "ab", True),
        ((4, 5), "ab", False),
        ((4, 3, 5, 1), "a\ufffdb", True),
        ((4, 1, 5, 1), "a\ufffdb", True),
        ((1,), "", True),
        ((), "", False),
    ),
)
def test_control_tokens_part_an_answers_text_and_its_end_is_known(ids, text, ended):
    assert answer_of(ids, WordTokenizer()) == Answer(text, ended)


def test_metrics_by_name():
    assert read_metrics(None, 16) == (Metric("pass", 1), Metric("pass", 16), Metric("maj", 16))
    assert read_metrics(None, 1) == (Metric("pass", 1),)
    assert read_metrics("maj@3, pass@2,maj@3", 4) == (Metric("maj", 3), Metric("pass", 2))
    for names, message in (
        ("pass@5", r"--metrics pass@5: K must lie between 1 and the 4 sample\(s\) per prompt"),
        ("maj@0", "--metrics maj@0: K must"),
        ("pas@4", "'pas@4' is not known; did you mean pass@4"),
        ("", "--metrics '' is not known; there are pass@K and maj@K"),
    ):
        with pytest.raises(UserError, match=message):
            read_metrics(names, 4)


def test_results_are_means_over_prompts_with_their_intervals():
    metrics = read_metrics("pass@1,pass@2,maj@4", 4)
    results = results_of(HEADER, PROMPTS, Judge("exact", "number"), metrics, Interval(500, 0.9, 1))
    # prompt 0: 2 right of 4; prompt 1: 2; prompt 2: none. pass@2: 1 - C(2,2)/C(4,2) = 5/6
    means = {name: figure.value for name, figure in results.metrics.items()}
    assert means == pytest.approx({"pass@1": (0.5 + 0.5) / 3, "pass@2": (5 / 6 + 5 / 6) / 3, "maj@4": 2 / 3})
    # all three draws are the wrong prompt in 1 of 27 resamples, less than the 1 in 20 below the interval
    assert (results.metrics["maj@4"].low, results.metrics["maj@4"].high) == (1 / 3, 1)
    log_p = math.log(sum(math.exp(-1 - m) for m in range(4)) / 4)
    assert results.log_p_mean.value == pytest.approx(log_p, rel=1e-14) == results.log_p_mean.low
    assert results.rationale_tokens_mean.value == 2.75 and results.answer_tokens_mean.value == 2.5
    assert results.forced_fraction.value == 0.25 and results.cut_off_fraction.value == pytest.approx(1 / 12)
    shown = table(results)
    assert "pass@2" in shown and "0.5556" in shown and "exact match, text normalised by rule number" in shown


def written(path, prompts=PROMPTS) -> None:
    file = SampleFile(path, HEADER)
    for samples in prompts:
        file.append(samples)
    file.close()


def test_the_file_gives_back_what_was_written(tmp_path):
    written(tmp_path / "s.jsonl")
    assert read_samples(tmp_path / "s.jsonl") == (HEADER, PROMPTS)


@pytest.mark.parametrize("cut", (0, 1, 5, 150, 600, 900))
def test_a_cut_file_continues_after_its_last_whole_prompt(cut, tmp_path):
    path = tmp_path / "s.jsonl"
    written(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    if cut:
        with pytest.raises(UserError, match=r"holds \d of 3 prompts: its evaluation was stopped; run the same command"):
            read_samples(path)
    file = SampleFile(path, replace(HEADER, source="moved"))
    assert file.done == (3 if not cut else 2 if cut < 700 else 1)
    for samples in PROMPTS[file.done :]:
        file.append(samples)
    file.close()
    assert path.read_bytes() == content


def test_a_file_of_another_evaluation_is_refused_by_what_differs(tmp_path):
    written(tmp_path / "s.jsonl")
    other = replace(HEADER, weights="v", temperature=0.5)
    with pytest.raises(UserError, match=r"holds another evaluation \(it differs in weights, temperature\)"):
        SampleFile(tmp_path / "s.jsonl", other)
    assert read_samples(tmp_path / "s.jsonl")[1] == PROMPTS


@pytest.mark.parametrize(
    ("line", "text", "message"),
    (
        (0, '{"step": 1}\n', "is no file of samples: its first line"),
        (0, "not json\n", "is no file of samples: its first line"),
        (0, '{"evaluation": {"format": 99}}\n', "was written by a later version"),
        (3, "not json\n", ":4 is not a sample"),
        (3, '{"prompt": 0}\n', ":4 is not a sample"),
        (3, None, ":4 is out of place: prompt 0, sample 3"),
    ),
)
def test_a_damaged_file_is_refused_by_its_line(line, text, message, tmp_path):
    path = tmp_path / "s.jsonl"
    written(path)
    lines = path.read_text().split("\n")
    lines[line : line + 1] = [] if text is None else [text.rstrip("\n")]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        read_samples(path)


def test_results_are_written_whole_and_refused_where_there_is_no_room_for_them(tmp_path):
    write_results(HEADER, PROMPTS, Judge(), "pass@1", Interval(10), tmp_path / "new" / "out")
    results = json.loads((tmp_path / "new" / "out" / "evaluation.json").read_text())
    assert results["metrics"]["pass@1"]["value"] == pytest.approx(1 / 6)
    assert results["evaluation"]["checkpoint_step"] == 7
    assert results["judge"] == {"match": "exact", "rule": "none", "extract": "none", "ratios": False}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output .*file/out cannot be written: Not a directory"):
        write_results(HEADER, PROMPTS, Judge(), None, Interval(10), tmp_path / "file" / "out")
    with pytest.raises(UserError, match="--bootstrap-resamples must be at least 1, not 0"):
        write_results(HEADER, PROMPTS, Judge(), None, Interval(0), None)
    with pytest.raises(UserError, match="--confidence must lie between 0 and 1, not 95"):
        write_results(HEADER, PROMPTS, Judge(), None, Interval(10, 95.0), None)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl: No such file .*; name a samples.jsonl"):
        read_header(tmp_path / "nowhere.jsonl")
