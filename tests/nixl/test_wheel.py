"""Tests an installed wheel nixl-tcpx. Run by wheel.sh, in an environment that has it and NIXL's wheels."""

import importlib.metadata
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request

import harness
from harness import Node, RemoteNode, case, check, check_equal

import nixl_tcpx

PLAIN = {k: v for k, v in os.environ.items() if k != "NIXL_PLUGIN_DIR"}


def cached(**environment):
    """An environment with the package where no installer put it, so that its links are in a cache."""
    return {**PLAIN, "PYTHONPATH": alone(), **environment}


def tool(*words, environment=None):
    done = subprocess.run(words, capture_output=True, text=True, env=environment or PLAIN, timeout=60)
    return done.returncode, done.stdout + done.stderr


def module(*words, environment=None):
    return tool(sys.executable, "-m", "nixl_tcpx", *words, environment=environment)


@case()
def directory_has_both():
    code, text = module("plugin-dir")
    check_equal(code, 0, text)
    directory = pathlib.Path(text.strip())
    for name in ("TCPX", "UCX"):
        check((directory / f"libplugin_{name}.so").exists(), f"no {name} in {directory}")
    check_equal(module("plugin-dir")[1].strip(), str(directory), "the directory asked again")
    check_equal(directory.stat().st_uid, os.getuid(), "owner of the directory")


@case()
def directory_is_part_of_the_installation():
    for words in (["plugin-dir"], ["as-ucx", "--dir"]):
        code, text = module(*words)
        check_equal(code, 0, text)
        directory = pathlib.Path(text.strip())
        check(pathlib.Path(nixl_tcpx.__file__).parent in directory.parents, f"{directory} is outside of the package")
        listed = {pathlib.Path(file.locate()) for file in importlib.metadata.files("nixl-tcpx")}
        missing = [entry for entry in directory.parent.rglob("*") if entry.is_symlink() and entry not in listed]
        check(not missing, f"an installer does not know {missing}")


@case()
def directories_of_a_package_that_is_gone_go_too():
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name in ("old", "new"):
            shutil.copytree(pathlib.Path(nixl_tcpx.__file__).parent, pathlib.Path(folder, name, "nixl_tcpx"), symlinks=True)
            code, text = module("plugin-dir", environment={**PLAIN, "PYTHONPATH": os.path.join(folder, name), "XDG_CACHE_HOME": os.path.join(folder, "cache")})
            check_equal(code, 0, text)
            found.append(pathlib.Path(text.strip()))
            shutil.rmtree(os.path.join(folder, "old"), ignore_errors=True)
        check(not found[0].exists() and found[1].exists(), f"{found[0]} is still there, or {found[1]} is not")


@case()
def metadata_says_what_a_reader_of_an_index_needs():
    metadata = importlib.metadata.metadata("nixl-tcpx")
    for name in ("Author", "Keywords", "Project-URL", "Requires-Python", "License-Expression"):
        check(metadata[name], f"no {name}")
    # pip install 'nixl-tcpx[nixl]' takes a NIXL that this plugin was made for.
    requirements = [line.replace(" ", "").replace("'", '"') for line in importlib.metadata.requires("nixl-tcpx")]
    oldest, beyond = (".".join(map(str, version)) for version in (nixl_tcpx._find.OLDEST, nixl_tcpx._find.BEYOND))
    check(any(f"nixl>={oldest},<{beyond};" in r or f"nixl<{beyond},>={oldest};" in r for r in requirements), f"requirements: {requirements}")
    description = metadata.get_payload() or metadata["Description"]
    for word in ("NIXL 1.0 to 1.5", "NIXL_TCPX_CACHE", "as-ucx"):
        check(word in description, f"the description does not say {word}")
    check("NIXL_TCPX_CACHE" in module("--help")[1], "the module's help does not name NIXL_TCPX_CACHE")


@case()
def directory_survives_without_a_home():
    code, text = module("plugin-dir", environment=cached(HOME="/proc/nowhere", XDG_CACHE_HOME="/proc/nowhere"))
    check_equal(code, 0, text)
    check((pathlib.Path(text.strip()) / "libplugin_TCPX.so").exists(), text)


@case()
def directory_belongs_to_no_other_user():
    if os.getuid() != 0:
        raise harness.Skip("only root can become another user")
    with tempfile.TemporaryDirectory() as shared:
        os.chmod(shared, 0o1777)
        environment = cached(HOME="/proc/nowhere", XDG_CACHE_HOME="/proc/nowhere", TMPDIR=shared)
        code, text = module("plugin-dir", environment=environment)
        check_equal(code, 0, text)
        first = pathlib.Path(text.strip()).relative_to(shared).parts[0]
        check_equal(stat.S_IMODE(os.stat(os.path.join(shared, first)).st_mode), 0o700, "mode of the directory in a directory of all")
        # Another user who creates that name first could put other plugins there later.
        for prepare in (lambda place: (os.mkdir(place), os.chown(place, 65534, 65534)), lambda place: (os.mkdir(place), os.chmod(place, 0o777)),
                        lambda place: os.symlink(os.path.join(shared, "other"), place)):
            for name in os.listdir(shared):
                shutil.rmtree(os.path.join(shared, name), ignore_errors=True)
            prepare(os.path.join(shared, first))
            code, text = module("plugin-dir", environment=environment)
            check(code == 1 and "NIXL_TCPX_CACHE" in text and "Traceback" not in text, f"{code} {text}")
            if os.path.islink(os.path.join(shared, first)):
                os.remove(os.path.join(shared, first))


@case()
def directory_is_absolute():
    with tempfile.TemporaryDirectory() as folder:
        for environment in ({"NIXL_TCPX_CACHE": "here"}, {"HOME": "here", "XDG_CACHE_HOME": "there", "TMPDIR": folder}):
            done = subprocess.run([sys.executable, "-m", "nixl_tcpx", "plugin-dir"], capture_output=True, text=True, cwd=folder,
                                  env=cached(**environment), timeout=60)
            check(done.returncode == 0 and done.stdout.startswith(os.path.join(folder, "")), f"{environment}: {done.stdout}{done.stderr}")


def ucx_alone():
    """The exit status of a process with only UCX, from NIXL's own wheel."""
    package = os.environ.get("NIXL_PACKAGE", "nixl")
    program = f"import {package}._api as api; agent = api.nixl_agent('alone', api.nixl_agent_config(backends=['UCX']))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, env=PLAIN, timeout=60).returncode


@case()
def both_back_ends_in_one_program():
    if (code := ucx_alone()) != 0:
        # UCX's bundled libnl crashes at the end of a process that has the system's RDMA libraries, too.
        raise harness.Skip(f"a process with NIXL's UCX back end alone ends with status {code} here")
    nixl_tcpx.enable()
    one, two = Node("one"), Node("two", backend="UCX")
    plugins = one.agent.get_plugin_list()
    check("UCX" in plugins and "TCPX" in plugins, f"plugins: {plugins}")
    one.allocate("data", 4096)
    two.allocate("data", 4096)


def scraped(port):
    """The values of NIXL's Prometheus exporter, summed over their labels."""
    sums = {}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                sums[name] = sums.get(name, 0) + float(value)
    return sums


@case(NIXL_TELEMETRY_ENABLE="y", NIXL_TELEMETRY_EXPORTER="prometheus", NIXL_TELEMETRY_PROMETHEUS_LOCAL="y", NIXL_TELEMETRY_RUN_INTERVAL="50")
def nixl_exports_what_tcpx_moves():
    if tuple(map(int, importlib.metadata.version(os.environ.get("NIXL_PACKAGE", "nixl")).split(".")[:2])) < (1, 5):
        raise harness.Skip("older versions of NIXL call these numbers by other names")
    nixl_tcpx.enable()
    size, writes, reads = 1 << 20, 3, 2
    there = RemoteNode(name="there", environment={"NIXL_TELEMETRY_ENABLE": None})
    base, device = there.allocate("data", size, 2)
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    os.environ["NIXL_TELEMETRY_PROMETHEUS_PORT"] = str(port)
    here = Node("here")
    here.allocate("data", size, 1)
    here.connect(there.metadata())
    for operation, times in (("WRITE", writes), ("READ", reads)):
        for _ in range(times):
            check_equal(here.move(operation, "data", [(0, size)], [(base, size, device)], "there"), "DONE", operation)
    # A transfer that fails is counted too.
    there.deregister("data")
    check(here.try_move("WRITE", "data", [(0, size)], [(base, size, device)], "there") != "DONE", "a write into deregistered memory")
    wanted = {"agent_tx_bytes_total": writes * size, "agent_rx_bytes_total": reads * size, "agent_memory_registered_total": size, "agent_errors_total": 1}
    deadline, told = time.monotonic() + 20, {}
    while not all(told.get(name) == value for name, value in wanted.items()) and time.monotonic() < deadline:
        time.sleep(0.1)
        told = scraped(port)
    print("note:", {name: value for name, value in told.items() if name.startswith("agent") and value and "bucket" not in name})
    for name, value in wanted.items():
        check_equal(told.get(name), value, name)
    check(told.get("agent_xfer_time_total", 0) > 0, "no time of transfers")
    there.close()


@case()
def doctor_is_content():
    code, text = module("doctor")
    print(text)
    check_equal(code, 0, "doctor")
    check("UCX" in text and "all right" in text, "what the doctor says")


@case()
def doctor_names_the_trouble():
    code, text = module("doctor", environment={**PLAIN, "NIXL_PLUGIN_DIR": "/tmp"})
    check(code == 1 and "export NIXL_PLUGIN_DIR=" in text, f"a directory without the plugin: {code} {text}")
    code, text = tool(sys.executable, "-I", "-S", "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy; "
                      "sys.argv[1:] = ['doctor']; runpy.run_module('nixl_tcpx', run_name='__main__')", alone())
    check(code == 1 and "pip install nixl" in text, f"without NIXL: {code} {text}")


def alone():
    """A directory with only this module."""
    directory = pathlib.Path(os.environ["WHEEL_SCRATCH"]) / "alone"
    directory.mkdir(exist_ok=True)
    link = directory / "nixl_tcpx"
    if not link.exists():
        link.symlink_to(pathlib.Path(nixl_tcpx.__file__).parent)
    return str(directory)


@case()
def versions_are_judged():
    check_equal(nixl_tcpx.__version__, importlib.metadata.version("nixl-tcpx"), "version")
    for version in ("1.0.0", "1.5.1", "1.5.9rc1", "", "unknown"):
        check(nixl_tcpx.supported(version), f"NIXL {version}")
    for version in ("0.9.0", "1.6.0", "2.0.0"):
        check(not nixl_tcpx.supported(version), f"NIXL {version}")


@case()
def the_nixl_that_is_chosen_is_the_one_that_is_judged():
    with tempfile.TemporaryDirectory() as site:
        for package, version in (("nixl_cu13", "1.5.1"), ("nixl_cu12", "1.9.0")):
            plugins = pathlib.Path(site, f".{package}.mesonpy.libs", "plugins")
            plugins.mkdir(parents=True)
            (plugins / "libplugin_UCX.so").touch()
            pathlib.Path(site, package).mkdir()
            pathlib.Path(site, package, "__init__.py").touch()
            information = pathlib.Path(site, f"{package}-{version}.dist-info")
            information.mkdir()
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {version}\n")
        for package, warns in (("nixl_cu13", False), ("nixl_cu12", True)):
            program = f"import nixl_tcpx; print(nixl_tcpx.enable({package!r}))"
            environment = {**PLAIN, "PYTHONPATH": site, "NIXL_TCPX_CACHE": os.path.join(site, "cache")}
            environment.pop("NIXL_PACKAGE", None)
            code, text = tool(sys.executable, "-c", program, environment=environment)
            check(code == 0 and ("was not tested with NIXL 1.9.0" in text) == warns, f"{package}: {code} {text}")


@case()
def licences_are_inside():
    names = {pathlib.Path(f).name: f for f in importlib.metadata.files("nixl-tcpx") if "licenses" in str(f)}
    for name in ("LICENSE", "THIRD-PARTY-NOTICES.txt"):
        check(name in names, f"no {name}")
    text = names["THIRD-PARTY-NOTICES.txt"].read_text()
    for crate in ("socket2", "snow", "clap"):
        check(f"\n{crate} " in text, f"{crate} is not among the third parties")


@case()
def tools_run():
    folder = pathlib.Path(sys.executable).parent
    for line in ("tcpx-info", "tcpx-perf --version", "tcpx-perf demo --help", "tcpx-top --version"):
        program, *words = line.split()
        code, text = tool(str(folder / program), *words)
        check_equal(code, 0, f"{line}: {text}")
    code, text = module("info")
    check(code == 0 and nixl_tcpx.plugin_path() in text, f"info: {code} {text}")
    for name in ("perf", "top"):
        check_equal(module(name, "--version")[0], 0, name)
    check_equal(module("nonsense")[0], 2, "a word that is none")


if __name__ == "__main__":
    harness.main(__doc__)
    sys.exit(0)
