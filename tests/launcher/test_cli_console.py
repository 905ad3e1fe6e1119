import pytest

from onetrain.launcher import console


@pytest.mark.parametrize(
    ("value", "cell"),
    [(None, "-"), (True, "True"), (12345, "12,345"), (0.0624, "0.0624"), (0.0, "0.0000"), (1e-6, "1e-06"), ("a", "a")],
)
def test_cells(value, cell):
    assert console.format_value(value) == cell


def test_a_table_shows_brackets_and_long_text_whole(capsys):
    long = "x" * 100
    console.print_table("[title]", ["a[b]", "n"], [["[red]text[/red]", 1234], [long, None]], ["note [c]"])
    out = capsys.readouterr().out
    for part in ("[title]", "a[b]", "[red]text[/red]", "1,234", long, "note [c]"):
        assert part in out


def test_an_empty_table_prints_its_columns(capsys):
    console.print_table("t", ["one", "two"], [])
    assert "one" in capsys.readouterr().out


def test_an_error_goes_to_standard_error_unwrapped(capsys):
    message = "/a/long/path " * 30 + "[end]"
    console.print_error(message)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == f"error: {message}"


def test_progress_without_a_terminal_prints_now_and_then(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress() as report:
        for done in range(0, 101):
            report("reading", done, 100)
            now[0] += 0.25
        report("sorting", 5, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "reading: 0 of 100",
        "reading: 40 of 100, 15 s left",
        "reading: 80 of 100, 5 s left",
        "reading: 100 of 100",
        "sorting: 5",
    ]


def test_progress_on_a_terminal_draws_bars(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress() as report:
        report("reading [x]", 1, None)
        report("reading [x]", 2, None)
        report("sorting", 3, 4)
    out = capsys.readouterr().err
    assert "reading [x]" in out
    assert "2/2" in out  # the stage that ended is complete
    assert "3/4" in out
