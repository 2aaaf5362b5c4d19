"""Finds NIXL's packages and their plugins, and puts TCPX beside them without touching them. Knows files, imports nothing of NIXL."""

import csv
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import stat
import sys
import tempfile
from typing import NamedTuple, Optional

from ._version import __version__

PLUGIN = "libplugin_TCPX.so"
# NIXL takes a plugin's name from its file's.
UCX, UCX_REAL = "libplugin_UCX.so", "libplugin_UCX_REAL.so"
STANDS_FOR_UCX = "libtcpx_as_ucx.so"
DISTRIBUTION = "nixl-tcpx"
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
    return str(_own("plugins") / PLUGIN)


def _own(*names):
    """A path inside this package."""
    return pathlib.Path(__file__).parent.joinpath(*names)


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
                if (folder / UCX).exists():
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


def named_dir() -> Optional[pathlib.Path]:
    """The directory that NIXL_PLUGIN_DIR names, where it exists and is not one of those made here."""
    named = os.environ.get("NIXL_PLUGIN_DIR")
    if not named or not os.path.isdir(named):
        return None
    folder = pathlib.Path(os.path.abspath(named))
    return None if any(place.folder in folder.parents for place in _places()) else folder


def _links_of(source, target, names):
    for name in names:
        (target / name).symlink_to(source / name)


def _build(nixl, root, as_ucx):
    """A copy, in links, of the part of site-packages that NIXL's plugins refer to by relative paths, with TCPX among the plugins."""
    libraries, site, plugins = nixl.plugins.parent, nixl.plugins.parent.parent, root / nixl.plugins.parent.name / nixl.plugins.name
    plugins.mkdir(parents=True)
    _links_of(site, root, sorted(e.name for e in site.glob("*.libs") if e != libraries and nixl.package in e.name))
    _links_of(libraries, plugins.parent, sorted(e.name for e in libraries.glob("*.so*")))
    own = {PLUGIN: plugin_path()}
    if as_ucx:
        own[UCX] = _own("plugins", STANDS_FOR_UCX)
        if (nixl.plugins / UCX).exists():
            own[UCX_REAL] = nixl.plugins / UCX
    _links_of(nixl.plugins, plugins, sorted(e.name for e in nixl.plugins.iterdir() if e.name not in own))
    for name, target in own.items():
        (plugins / name).symlink_to(target)


class Place(NamedTuple):
    """Where directories of links may lie."""

    folder: pathlib.Path
    # Whether its parent must be of this user alone, too.
    private: bool = False
    # The list of this installation's files, which then names the links: who uninstalls the package removes them.
    record: Optional[pathlib.Path] = None


def _record() -> Optional[pathlib.Path]:
    """The list of the files of the installation that this package is part of; None where there is none."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    if pathlib.Path(distribution.locate_file(__package__)) != _own():
        return None
    found = [pathlib.Path(distribution.locate_file(file)) for file in distribution.files or () if file.name == "RECORD"]
    return found[0] if len(found) == 1 else None


def _places():
    """The places for directories of links, the best first."""
    chosen, home, name = os.environ.get("NIXL_TCPX_CACHE"), os.path.expanduser("~"), "nixl-tcpx"
    if chosen:
        # A program may look for plugins from another directory than the one in which it asked.
        yield Place(pathlib.Path(os.path.abspath(chosen)) / name)
    record = _record()
    if record:
        yield Place(_own("links"), record=record)
    # A user without an entry in the list of users may have no home, and no "~" either.
    for place in (os.environ.get("XDG_CACHE_HOME"), os.path.join(home, ".cache")):
        if place and os.path.isabs(place):
            yield Place(pathlib.Path(place) / name)
    # In a directory that others can write to, another user may have been first.
    yield Place(pathlib.Path(tempfile.gettempdir()) / f"nixl-tcpx-{os.getuid()}" / name, private=True)


def _is_own(folder, links=False):
    """Whether it is a directory of this user, in which no other user can write; `links`: or a link to one."""
    found = os.stat(folder, follow_symlinks=links)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _usable(place):
    """Whether links can be made there; makes the folder."""
    if place.record:
        # Who could write there could change this package.
        if os.access(place.record, os.W_OK) and os.access(place.folder.parent, os.W_OK):
            place.folder.mkdir(mode=0o755, exist_ok=True)
            return True
        return False
    parent = place.folder.parent
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Who owns the parent could put another folder there later.
    if place.private and not _is_own(parent):
        return False
    place.folder.mkdir(mode=0o700, exist_ok=True)
    return _is_own(place.folder, links=not place.private) and os.access(place.folder, os.W_OK)


def _prune(folder):
    """Removes directories of links whose package is no longer there."""
    for root in folder.iterdir():
        links = [folder / PLUGIN for folder in root.glob("*/*")]
        if any(link.is_symlink() and not link.exists() for link in links):
            shutil.rmtree(root, ignore_errors=True)


def _write_down(record, root):
    """Lists the links of `root` among the files of the installation."""
    site = record.parent.parent
    links = sorted(entry for entry in root.rglob("*") if entry.is_symlink())
    with open(record, "a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows((os.path.relpath(link, site), "", "") for link in links)


def _make(place, name, nixl, as_ucx):
    """The directory of that name in the place, which is made."""
    root = place.folder / name
    scratch = pathlib.Path(tempfile.mkdtemp(dir=place.folder))
    _build(nixl, scratch, as_ucx)
    if place.record:
        scratch.chmod(0o755)
    try:
        # Another process may do the same: the first one wins, and both have the same links.
        scratch.rename(root)
    except OSError:
        shutil.rmtree(scratch)
        if not root.is_dir():
            raise
    else:
        if place.record:
            _write_down(place.record, root)
        _prune(place.folder)


def plugin_dir(package=None, as_ucx=False):
    """A directory for NIXL_PLUGIN_DIR that holds TCPX and the plugins of the NIXL found; TCPX alone where there is no NIXL.

    `as_ucx`: TCPX is there under the name UCX too, and UCX as UCX_REAL; the other plugins are those of the directory that NIXL_PLUGIN_DIR
    names already, if it does.
    """
    named = named_dir() if as_ucx else None
    nixl = Nixl("", "", named) if named else find_nixl(package)
    if nixl is None and not as_ucx:
        return str(pathlib.Path(plugin_path()).parent)
    nixl = nixl or Nixl("", "", _own("plugins"))
    stamp = [__version__, plugin_path(), str(nixl.plugins), str(as_ucx)]
    stamp += [f"{entry.name} {entry.stat().st_mtime_ns}" for entry in sorted(nixl.plugins.iterdir()) if entry.exists()]
    words = ["as-ucx"] * as_ucx + [nixl.package or "plugins", nixl.version, hashlib.sha256(chr(10).join(stamp).encode()).hexdigest()[:16]]
    name = "-".join(word for word in words if word)
    for place in _places():
        inside = place.folder / name / nixl.plugins.parent.name / nixl.plugins.name
        try:
            # Made before, perhaps by the user who installed the package.
            if place.record and inside.is_dir():
                return str(inside)
            if not _usable(place):
                continue
        except OSError:
            continue
        if not inside.is_dir():
            _make(place, name, nixl, as_ucx)
        return str(inside)
    raise OSError("no directory can be written for the links to NIXL's plugins: set NIXL_TCPX_CACHE to one")
