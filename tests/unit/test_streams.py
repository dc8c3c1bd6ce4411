"""Output never ends a program: any locale, any reader, and none. And what we write to files is UTF-8 in every locale.

Why: a run that prints `ln P̂` on a terminal of another alphabet, or through `| head`, would die of it hours later.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("megatron_jq", "tools", "examples", "launch") for path in (REPOSITORY / folder).rglob("*.py")
)
#: Prints what a run prints, from several places, then the exit code's word that all of it went well.
PROGRAM = """
import sys
from megatron_jq import streams
streams.protect()
for number in range(20000):
    print(f"ln P\\u0302 \\u2192 {number} \\udc80 \\U0001f600")
print("\\u00e9\\u0142", file=sys.stderr)
sys.stdout.flush()
open(sys.argv[1], "w").write("done")
"""


def run(argv: list[str], **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    return subprocess.Popen([sys.executable, *argv], env=environment, **options)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "ascii:strict", "utf-16"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_text_that_the_locale_cannot_print_is_escaped(encoding, unbuffered, tmp_path):
    variables = {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered, "PYTHONUTF8": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = run(["-c", PROGRAM, str(tmp_path / "end")], env=variables, **pipes)
    out, err = process.communicate()
    assert process.returncode == 0 and (tmp_path / "end").exists(), err
    text = out.decode(encoding.partition(":")[0])
    assert text.count("\n") == 20000 and "19999" in text
    assert "\\udc80" in text and ("P̂" in text) == encoding.startswith("utf"), text[:80]


def test_a_reader_that_went_away_ends_nothing(tmp_path):
    reader, writer = os.pipe()
    process = run(["-c", PROGRAM, str(tmp_path / "end")], stdout=writer, stderr=writer)
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    assert process.wait() == 0 and (tmp_path / "end").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_was_closed_from_the_start_gets_no_file_of_ours(closed, tmp_path):
    """The first file that a process opens would have the closed stream's number, and what is printed would go there."""
    command = f"exec {sys.executable} -c \"$0\" '{tmp_path / 'end'}' {closed}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(["bash", "-c", command, PROGRAM], env=environment, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "end").read_text(encoding="utf-8") == "done"


def test_a_terminal_that_does_not_block_loses_nothing(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = run(["-c", PROGRAM, str(tmp_path / "end")], stdout=writer)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read().decode()
    assert process.wait() == 0 and text.count("\n") == 20000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_what_a_full_disk_refuses_is_an_error_of_commands_that_print_their_result():
    grid = ["-m", "megatron_jq", "grid", "--help"]
    for argv in (grid, ["-m", "megatron_jq", "--help"]):
        with open("/dev/full", "wb") as full:
            process = run(argv, stdout=full, stderr=subprocess.PIPE)
            _, err = process.communicate()
        if argv is not grid:  # argparse ends the process by itself, with what is printed in a buffer
            assert process.returncode == 3 and b"standard output: No space left on device" in err, err


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["convert", "--help"]])
def test_commands_print_their_help_in_any_locale(command):
    variables = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = run(["-m", "megatron_jq", *command], env=variables, **pipes)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"") and out.isascii() and len(out) > 100


#: Programs whose output is digits, or JSON in ASCII.
PRINT_NO_TEXT = ("node.py", "make_data.py", "math_worker.py")


def test_every_program_protects_its_output_first():
    """A script's `__main__` calls streams.protect, or what does so: run_tool, or the command line's `program`."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text and path.name not in PRINT_NO_TEXT:
            assert any(f"{name}(" in text for name in ("streams.protect", "run_tool", "program")), path


#: Called with a mode as its second argument (open) or its first (Path.open); text unless it holds a b.
OPENING = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0, "SpooledTemporaryFile": 1}
TEXT = ("read_text", "write_text")
PROCESSES = ("run", "Popen", "check_output", "check_call", "getoutput")


def leaves_the_encoding_to_the_locale(node: ast.Call) -> bool:
    """Whether a call opens a file, or a process's output, as text without saying in which encoding."""
    name = getattr(node.func, "attr", getattr(node.func, "id", None))
    words = {keyword.arg: keyword.value for keyword in node.keywords}
    if "encoding" in words or None in words:
        return False
    if name in TEXT:
        return not any(isinstance(argument, ast.Constant) and argument.value == "utf-8" for argument in node.args)
    if name in PROCESSES:
        return any(word in words for word in ("text", "universal_newlines"))
    if name not in OPENING or (isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "os"):
        return False  # os.open has numbers for modes
    of_a_path = name == "open" and isinstance(node.func, ast.Attribute)
    position = 0 if of_a_path else OPENING[name]
    mode = words.get("mode", node.args[position] if len(node.args) > position else None)
    default = "w+b" if "Temporary" in name else "r"
    written = mode.value if isinstance(mode, ast.Constant) else default if mode is None else "?"
    return "b" not in str(written)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_file_is_opened_in_the_locales_encoding(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and leaves_the_encoding_to_the_locale(n)]
    assert not wrong, f"{path}: lines {wrong}: say encoding='utf-8' (a text file is UTF-8 whatever the locale)"


@pytest.mark.parametrize(
    ("call", "is_wrong"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, 'ab')", False),
        ("open(p, mode='rb')", False),
        ("open(p, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('rb')", False),
        ("path.read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("tempfile.NamedTemporaryFile(dir=d)", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(c, text=True)", True),
        ("subprocess.run(c, capture_output=True)", False),
        ("os.open(path, os.O_RDONLY)", False),
    ],
)
def test_the_check_knows_every_way_to_open(call, is_wrong):
    assert leaves_the_encoding_to_the_locale(ast.parse(call, mode="eval").body) == is_wrong
