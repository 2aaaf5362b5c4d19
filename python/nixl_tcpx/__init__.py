"""The NIXL backend TCPX: where its plugin is, and how NIXL finds it beside its own.

NIXL looks for plugins in its own directory, or in NIXL_PLUGIN_DIR instead. `plugin_dir()` gives a directory that has both; `enable()` sets
the variable for this process and those it starts.
"""

from ._find import Nixl, find_nixl, nixl_version, plugin_dir, plugin_path, supported
from ._version import __version__

__all__ = ["Nixl", "__version__", "enable", "find_nixl", "nixl_version", "plugin_dir", "plugin_path", "supported"]


def enable(package=None):
    """Points NIXL_PLUGIN_DIR at TCPX and NIXL's own back ends. To be called before the first agent; gives the directory."""
    import os
    import warnings

    nixl = find_nixl(package)
    if nixl and not supported(nixl.version):
        warnings.warn(f"nixl_tcpx {__version__} was not tested with NIXL {nixl.version}", RuntimeWarning, stacklevel=2)
    directory = plugin_dir(package)
    os.environ["NIXL_PLUGIN_DIR"] = directory
    return directory
