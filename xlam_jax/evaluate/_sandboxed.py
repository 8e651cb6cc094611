"""What runs in the sandbox: executes code that it is sent, a JSON text a line, and sends back what it printed."""

import ast
import contextlib
import io
import json
import os
import sys
import traceback


def main(longest: int) -> None:
    """Reads from stdin until it ends. `_shut_in` has set every limit; an output is cut at `longest` characters."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    source = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.addaudithook(alone)  # the kernel refuses it as well, with a message that does not say why
    names = {"__name__": "__main__"}
    for line in source:
        answers.write(json.dumps(run(json.loads(line), names)[:longest]) + "\n")
        answers.flush()


def alone(event: str, _: tuple) -> None:
    """Refuses to start processes."""
    if event.startswith(("os.fork", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.", "pty.")):
        raise PermissionError("no other processes can be started here")


def run(code: str, names: dict) -> str:
    """What the code printed, the value of its last expression, and its error."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            body = ast.parse(code)
            end = body.body[-1] if body.body else None
            if isinstance(end, ast.Expr):
                body.body.pop()
            exec(compile(body, "<code>", "exec"), names)
            if isinstance(end, ast.Expr):
                value = eval(compile(ast.Expression(end.value), "<code>", "eval"), names)
                if value is not None:
                    print(repr(value))
        except BaseException as error:  # SystemExit too: the session goes on
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename == "<code>"]
            where = f" (line {own[-1].lineno})" if own else ""
            print("".join(traceback.format_exception_only(error)).strip() + where)
    return printed.getvalue()


if __name__ == "__main__":
    main(int(sys.argv[1]))
