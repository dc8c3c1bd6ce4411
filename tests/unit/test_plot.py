"""Run folders → table and picture."""

import json

import pytest

from megatron_jq.config import parse_args, to_toml
from megatron_jq.errors import UserError
from megatron_jq.report import plot_runs, read_run, read_runs, summary_table


def write_run(folder, rows, argv=None, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if argv is not None:
        (folder / "config.toml").write_text(to_toml(parse_args(argv)))
    return folder


def row(step, **metrics):
    return {"step": step, "log_p_mean": -30.0 + step, "effective_reward_max": 0.1 * step} | metrics


def test_series_leave_out_nulls_absent_keys_and_what_is_not_finite(tmp_path):
    rows = [row(1), row(2, log_p_mean=None), row(3, log_p_mean=float("nan")), {"step": 4}, row(5, log_p_mean=-1e300)]
    run = read_run(write_run(tmp_path / "a", rows))
    assert run.series("log_p_mean") == ([1, 5], [-29.0, -1e300])
    assert run.series("eval_exact_match") == ([], [])


def test_a_resumed_run_counts_its_later_lines(tmp_path):
    run = read_run(write_run(tmp_path / "a", [row(1), row(2), row(3), row(2, log_p_mean=-5.0), row(3)]))
    assert run.series("log_p_mean") == ([1, 2, 3], [-29.0, -5.0, -27.0])


def test_a_cut_last_line_is_left_out_and_told(tmp_path):
    run = read_run(write_run(tmp_path / "a", [row(1), row(2)], tail='{"step": 3, "log_p'))
    assert run.truncated
    assert run.series("log_p_mean")[0] == [1, 2]
    assert not read_run(write_run(tmp_path / "b", [row(1)])).truncated


@pytest.mark.parametrize("bad", ["{oops}\n", "{}\n", "3\n"])
def test_a_broken_line_names_file_and_line(tmp_path, bad):
    folder = write_run(tmp_path / "a", [row(1)], tail=bad)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a metrics line"):
        read_run(folder)


def test_missing_and_empty_runs_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere.metrics\.jsonl: No such file.*is .* a run folder\?"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no step yet"):
        read_run(write_run(tmp_path / "empty", []))


def test_labels_must_match_the_runs(tmp_path):
    folder = write_run(tmp_path / "a", [row(1)])
    assert [run.label for run in read_runs([folder, folder])] == ["a", "a"]
    assert [run.label for run in read_runs([folder], ["GARL"])] == ["GARL"]
    with pytest.raises(UserError, match="2 given for 1 runs"):
        read_runs([folder], ["a", "b"])


def test_summary_table_shows_each_run_on_an_aligned_line(tmp_path):
    folders = [
        write_run(tmp_path / "garl", [row(1), row(20, eval_exact_match=0.9375), row(25)], ["--q", "0.75"]),
        write_run(tmp_path / "step", [row(1)], "--q 1 --q-schedule step --q-final 0.25 --q-schedule-iters 9".split()),
        write_run(tmp_path / "grpo", [row(1, eval_exact_match=0.0)], ["--estimator", "grpo"]),
        write_run(tmp_path / "bare", [{"step": 7}]),
    ]
    lines = summary_table(read_runs(folders)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["run", "estimator", "q", "steps", "first ln P̂", "last ln P̂", "exact match"]
    assert cells[2:] == [
        ["garl", "garl", "0.75", "26", "-29.00", "-5.00", "93.8 %"],
        ["step", "garl", "1→0.25 (step)", "2", "-29.00", "-29.00", "-"],
        ["grpo", "grpo", "-", "2", "-29.00", "-29.00", "0.0 %"],
        ["bare", "-", "-", "8", "-", "-", "-"],
    ]
    assert len({len(line.replace("\u0302", "")) for line in lines}) == 1


def test_the_picture_shows_the_three_series_of_every_run(tmp_path, monkeypatch):
    rows = [row(1, eval_exact_match=0.25, reward_mean=0.1), row(2, reward_mean=0.2), row(3, eval_exact_match=0.5)]
    runs = read_runs([write_run(tmp_path / "a", rows), write_run(tmp_path / "b", [row(1)])], ["one", "two"])
    figures = []
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    plot_runs(runs, tmp_path / "x.png")
    curves = [[(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for axes in figures[0].axes]
    assert curves[0] == [([1, 2, 3], [-29.0, -28.0, -27.0]), ([1], [-29.0])]
    assert curves[1][0] == ([1, 2, 3], pytest.approx([0.1, 0.2, 0.3]))
    assert curves[2][:2] == [([1, 2], [0.1, 0.2]), ([1, 3], [0.25, 0.5])]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["one", "two"]


def test_the_tool_writes_a_png_and_prints_the_table(tmp_path, capsys):
    tool = load_tool()
    folder = write_run(tmp_path / "a run", [row(1), row(2, eval_exact_match=1.0)], [], tail='{"st')
    output = tmp_path / "new folder" / "escape.png"
    assert tool.main([str(folder), "--output", str(output), "--title", "t"]) == 0
    assert output.read_bytes().startswith(b"\x89PNG\r\n")
    shown = capsys.readouterr()
    assert "| a run | garl " in shown.out and "100.0 %" in shown.out and str(output) in shown.out
    assert "ends in a cut line" in shown.err


@pytest.mark.parametrize(("argv", "message"), [(["{}/none"], "cannot read"), (["{}/a", "--output", "{}/x.abc"], "abc")])
def test_the_tool_tells_bad_input_in_one_line(tmp_path, capsys, argv, message):
    write_run(tmp_path / "a", [row(1)])
    assert load_tool().main([word.format(tmp_path) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plot_run: error: ") and message in error and error.count("\n") == 1


def load_tool():
    from tools import plot_run

    return plot_run
