"""Lets this backend stand for UCX, for programs that name UCX and cannot be changed."""

import ctypes
import os
import sys

from . import _find

USAGE = """python -m nixl_tcpx as-ucx -- COMMAND ...     runs a command in which the NIXL backend UCX is this one, and UCX_REAL is UCX
python -m nixl_tcpx as-ucx --dir              prints the directory for NIXL_PLUGIN_DIR that does the same
python -m nixl_tcpx as-ucx --explain          says which of UCX's variables are understood here, and what they do"""


def explain():
    """The line that an agent with the backend UCX logs in this environment."""
    line = ctypes.create_string_buffer(4096)
    ctypes.CDLL(_find.plugin_path()).nixl_tcpx_explain_ucx(line, ctypes.c_size_t(len(line)))
    return line.value.decode(errors="replace")


def _directory():
    named = _find.named_dir()
    if named:
        print(f"nixl_tcpx: NIXL_PLUGIN_DIR is {named}: its plugins are taken, not those of the NIXL installed here", file=sys.stderr)
    elif not _find.supported():
        print(f"nixl_tcpx: this plugin was not tested with NIXL {_find.nixl_version()}", file=sys.stderr)
    return _find.plugin_dir(as_ucx=True)


def main(arguments):
    """The exit status; or the command, which replaces this process."""
    word, command = (arguments[0] if arguments else ""), arguments[1:]
    if word == "--dir" and not command:
        print(_directory())
        return 0
    if word == "--explain" and not command:
        print(explain())
        return 0
    if word == "--" and command:
        os.environ["NIXL_PLUGIN_DIR"] = _directory()
        sys.stdout.flush()
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"nixl_tcpx: {command[0]}: {error.strerror}", file=sys.stderr)
            return 127
    asked = word in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
