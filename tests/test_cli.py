"""How commands end, what their parsers say, and the options of a server."""

import errno
import importlib.metadata
import os
from typing import Any

import pytest

from xlam_jax.cli import Parser, add_server, number, positive, run
from xlam_jax.errors import STOPPED, StoppedError, UserError


def raises(error: BaseException) -> Any:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raises(UserError("a: wrong")), 2, "error: a: wrong\n"),
        (raises(StoppedError("stopped")), STOPPED, "stopped\n"),
        (raises(KeyboardInterrupt()), 130, "interrupted\n"),
        (raises(OSError(errno.ENOSPC, "", "out")), 2, "error: out: the disk is full; free some space and run again\n"),
        (
            raises(OSError(errno.EACCES, os.strerror(errno.EACCES), "in")),
            2,
            "error: in: Permission denied; check the path, and who may write there\n",
        ),
    ],
)
def test_how_a_command_ends(main: Any, code: int, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert (ended.value.code, capsys.readouterr().err) == (code, message)


def test_other_errors_keep_their_traceback():
    for error in (ValueError("a bug"), OSError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(error)):
            run(raises(error))


def test_a_parser_prints_the_version_and_one_error(capsys: pytest.CaptureFixture[str]):
    parser = Parser(prog="command")
    parser.add_argument("--count", type=positive)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"xlam_jax {importlib.metadata.version('xlam_jax')}\n"
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--count", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "usage: command [-h] [--version] [--count COUNT]\n"
        "error: argument --count: '0' is not a whole number of 1 or more\n"
    )


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (number(0), "-1", "'-1' is not a finite number of 0 or more"),
        (number(0), "nan", "'nan' is not a finite number of 0 or more"),
        (number(0), "inf", "'inf' is not a finite number of 0 or more"),
        (number(0, above=True), "0", "'0' is not a finite number above 0"),
        (number(0, 1), "1.1", "'1.1' is not a finite number from 0 to 1"),
        (number(), "five", "'five' is not a finite number"),
        (positive, "1.5", "'1.5' is not a whole number of 1 or more"),
    ],
)
def test_numbers_that_are_refused(kind: Any, text: str, message: str, capsys: pytest.CaptureFixture[str]):
    parser = Parser(prog="command")
    parser.add_argument("--number", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--number={text}"])
    assert capsys.readouterr().err.endswith(f"error: argument --number: {message}\n")


def test_numbers_that_are_accepted():
    assert (number(0, 1)("0"), number(0, 1)("1"), number()("-2.5"), positive("7")) == (0.0, 1.0, -2.5, 7)
    assert isinstance(positive("7"), int)


def test_the_options_of_a_server():
    parser = Parser()
    add_server(parser, retries=5)
    options = parser.parse_args(["--base-url", "http://a/v1", "--model", "m"])
    assert vars(options) == {"base_url": "http://a/v1", "model": "m", "api_key": None, "timeout": 120.0, "retries": 5}
    for missing in (["--base-url", "u"], ["--model", "m"]):
        with pytest.raises(SystemExit):
            parser.parse_args(missing)


def test_options_of_a_server_that_need_not_be_given():
    parser = Parser()
    add_server(parser, required=False, model="none", timeout=None, group=parser.add_mutually_exclusive_group())
    assert vars(parser.parse_args([])) == {"base_url": None, "api_key": None}
    parser = Parser()
    add_server(parser, model="optional")
    assert parser.parse_args(["--base-url", "u"]).model is None
