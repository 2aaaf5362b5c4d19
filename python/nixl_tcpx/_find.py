"""Finds NIXL's packages and their plugins, and puts TCPX beside them without touching them. Knows files, imports nothing of NIXL."""

import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import stat
import sys
import tempfile
from typing import NamedTuple, Optional

from ._version import __version__

PLUGIN = "libplugin_TCPX.so"
PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl_rocm", "nixl")
# First version whose plugin interface is this one's, and the first that may differ.
OLDEST, BEYOND = (1, 0), (1, 6)


class Nixl(NamedTuple):
    """An installed NIXL."""

    package: str
    version: str
    plugins: pathlib.Path


def plugin_path():
    """The plugin's file."""
    return str(pathlib.Path(__file__).parent / "plugins" / PLUGIN)


def _version_of(package):
    for name in (package.replace("_", "-"), "nixl"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return ""


def _plugins_of(package) -> Optional[pathlib.Path]:
    """The directory of the package's own plugins: where its libnixl.so looks, beside itself in `plugins`."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a word that names no package
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        site = pathlib.Path(location).parent
        for libraries in (f".{package}.mesonpy.libs", f"{package}.libs", package):
            for folder in (site / libraries / "plugins", site / libraries / "nixl"):
                if (folder / "libplugin_UCX.so").exists():
                    return folder
    return None


def _preferred():
    """NIXL's packages in the order in which NIXL itself would take them, as far as that is known."""
    chosen = os.environ.get("NIXL_PACKAGE")
    if chosen:
        return (chosen,)
    loaded = [p for p in PACKAGES if p != "nixl" and p in sys.modules]
    try:
        import nixl_meta_utils

        major = nixl_meta_utils.detect_cuda_major()
        loaded += [f"nixl_cu{major}"] if major else []
    except Exception:  # older versions have no such module, and a broken CUDA set-up is not ours to report
        pass
    return (*loaded, *PACKAGES)


def find_nixl(package=None) -> Optional[Nixl]:
    """The NIXL that a program will use; None when there is none. `package` picks one: nixl_cu12, nixl_cu13."""
    for name in (package,) if package else _preferred():
        plugins = _plugins_of(name)
        if plugins:
            return Nixl(name, _version_of(name), plugins)
    return None


def nixl_version():
    """The version of the NIXL found; empty without one."""
    found = find_nixl()
    return found.version if found else ""


def supported(version=None):
    """Whether this plugin was made for that version of NIXL; by default the one found. True when there is none to judge."""
    version = nixl_version() if version is None else version
    parts = version.split(".")[:2]
    if not all(p.isdigit() for p in parts) or len(parts) < 2:
        return True
    return OLDEST <= (int(parts[0]), int(parts[1])) < BEYOND


def _link_all(source, target, leave_out=()):
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.name not in leave_out:
            (target / entry.name).symlink_to(entry)


def _build(nixl, root):
    """A copy, in links, of the part of site-packages that NIXL's plugins refer to by relative paths, with TCPX among the plugins."""
    libraries, site = nixl.plugins.parent, nixl.plugins.parent.parent
    for entry in sorted(site.iterdir()):
        if entry != libraries and entry.name.endswith(".libs") and nixl.package in entry.name:
            (root / entry.name).symlink_to(entry)
    _link_all(libraries, root / libraries.name, leave_out=(nixl.plugins.name,))
    plugins = root / libraries.name / nixl.plugins.name
    _link_all(nixl.plugins, plugins, leave_out=(PLUGIN,))
    (plugins / PLUGIN).symlink_to(plugin_path())


def _is_own(folder, links=False):
    """Whether it is a directory of this user, in which no other user can write; `links`: or a link to one."""
    found = os.stat(folder, follow_symlinks=links)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _places():
    """Directories in which the cache may lie, the best first, each with whether it is for this user alone, too."""
    chosen, home = os.environ.get("NIXL_TCPX_CACHE"), os.path.expanduser("~")
    if chosen:
        # A program may look for plugins from another directory than the one in which it asked.
        yield pathlib.Path(os.path.abspath(chosen)), False
    # A user without an entry in the list of users may have no home, and no "~" either.
    for place in (os.environ.get("XDG_CACHE_HOME"), os.path.join(home, ".cache")):
        if place and os.path.isabs(place):
            yield pathlib.Path(place), False
    # In a directory that others can write to, another user may have been first.
    yield pathlib.Path(tempfile.gettempdir()) / f"nixl-tcpx-{os.getuid()}", True


def _cache():
    """A directory of this user alone."""
    for place, private in _places():
        folder = place / "nixl-tcpx"
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Who owns the place could put another folder there later.
            if private and not _is_own(place):
                continue
            folder.mkdir(mode=0o700, exist_ok=True)
            if _is_own(folder, links=not private) and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    raise OSError("no directory can be written for the links to NIXL's plugins: set NIXL_TCPX_CACHE to one")


def plugin_dir(package=None):
    """A directory for NIXL_PLUGIN_DIR that holds TCPX and the plugins of the NIXL found; TCPX alone where there is no NIXL."""
    nixl = find_nixl(package)
    if nixl is None:
        return str(pathlib.Path(plugin_path()).parent)
    stamp = [__version__, plugin_path(), str(nixl.plugins)]
    stamp += [f"{entry.name} {entry.stat().st_mtime_ns}" for entry in sorted(nixl.plugins.iterdir())]
    cache = _cache()
    root = cache / f"{nixl.package}-{nixl.version}-{hashlib.sha256(chr(10).join(stamp).encode()).hexdigest()[:16]}"
    inside = root / nixl.plugins.parent.name / nixl.plugins.name
    if not inside.is_dir():
        scratch = pathlib.Path(tempfile.mkdtemp(dir=cache))
        _build(nixl, scratch)
        try:
            # Another process may do the same: the first one wins, and both have the same links.
            scratch.rename(root)
        except OSError:
            import shutil

            shutil.rmtree(scratch)
            if not inside.is_dir():
                raise
    return str(inside)
