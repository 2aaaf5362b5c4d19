"""python -m nixl_tcpx info | perf ... | top ... | doctor | plugin-dir | as-ucx ...

info        versions, paths, and what the library sees on this host (arguments go to tcpx-info)
perf        measures between two hosts or within one (arguments go to tcpx-perf)
top         what the connections of a running process do (arguments go to tcpx-top)
doctor      moves data between two agents and says what is wrong where that fails
plugin-dir  prints the directory for NIXL_PLUGIN_DIR
as-ucx      lets this backend stand for UCX: as-ucx -- COMMAND ..., as-ucx --dir, as-ucx --explain

The directories are links inside this package, which uninstalling removes. Where the package cannot be written they are in the user's cache;
NIXL_TCPX_CACHE chooses another place.
"""

import sys

from . import _as_ucx, _doctor, _find, _tools


def main():
    """The exit status."""
    word, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if word == "info":
        return _doctor.info(arguments)
    if word in ("perf", "top"):
        sys.argv[1:] = arguments
        return getattr(_tools, word)()
    if word == "doctor" and not arguments:
        return _doctor.doctor()
    if word == "plugin-dir" and not arguments:
        print(_find.plugin_dir())
        return 0
    if word == "as-ucx":
        return _as_ucx.main(arguments)
    asked = word in ("-h", "--help", "help")
    print(__doc__.strip(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


try:
    sys.exit(main())
except OSError as error:
    sys.exit(f"nixl_tcpx: {error}")
