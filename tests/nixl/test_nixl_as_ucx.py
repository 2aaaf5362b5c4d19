"""Programs that name UCX, with TCPX in its place: python -m nixl_tcpx as-ucx. Run it with run.sh: NIXL_TEST=test_nixl_as_ucx.py."""

import glob
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import harness
from harness import case, check, check_equal

HERE = pathlib.Path(__file__).parent
PROGRAM = HERE / "ucx_program.py"
MIB = 1 << 20
# What a program's write and read of its standard size move.
MOVED = 2 * MIB
BUILT = os.environ.get("NIXL_PLUGIN_DIR", "")
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith("UCX_") and k != "NIXL_PLUGIN_DIR"}


def scratch():
    """A folder of this case, with the package nixl_tcpx as the wheel has it where it is not installed."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="as-ucx-"))
    if importlib.util.find_spec("nixl_tcpx") is None:
        package = folder / "site" / "nixl_tcpx"
        package.mkdir(parents=True)
        for source in (HERE.parent.parent / "python" / "nixl_tcpx").glob("*.py"):
            (package / source.name).symlink_to(source)
        (package / "plugins").symlink_to(os.path.abspath(BUILT))
        paths = [str(package.parent), *filter(None, [PLAIN.get("PYTHONPATH")])]
        PLAIN["PYTHONPATH"] = os.pathsep.join(paths)
    PLAIN["NIXL_TCPX_CACHE"] = str(folder / "cache")
    PLAIN["UCCL_TCPX_METRICS"] = str(folder / "metrics-%p")
    return folder


def tool(*words, **environment):
    """Exit status, standard output and standard error of `python -m nixl_tcpx`."""
    done = subprocess.run([sys.executable, "-m", "nixl_tcpx", *words], capture_output=True, text=True, env=merged(environment), timeout=60)
    return done.returncode, done.stdout, done.stderr


def merged(environment):
    return {k: v for k, v in {**PLAIN, **environment}.items() if v is not None}


def directory(**environment):
    code, out, err = tool("as-ucx", "--dir", **environment)
    check_equal(code, 0, err)
    return pathlib.Path(out.strip())


class Run:
    """ucx_program.py, run by a command until it has shown its result; what the library has counted meanwhile; and then to its end."""

    def __init__(self, folder, *options, command=None, moved=MOVED, **environment):
        command = command or [sys.executable, "-m", "nixl_tcpx", "as-ucx", "--"]
        with open(folder / "stderr", "w+", encoding="utf-8") as errors:
            program = subprocess.Popen([*command, sys.executable, str(PROGRAM), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                       text=True, env=merged(environment))
            lines = iter(program.stdout.readline, "")
            result = next((line for line in lines if line.startswith("{")), None)
            self.sent = counted(folder, moved) if result else {}
            program.stdin.close()
            program.stdout.read()
            self.code = program.wait(60)
            errors.seek(0)
            self.err = errors.read()
        print(self.err)
        check(result is not None, f"the program ended with {self.code} and without a result")
        self.result = json.loads(result)
        check(self.result["written"] and self.result["read"], f"other bytes: {self.result}")
        for path in glob.glob(str(folder / "metrics-*")):
            os.remove(path)

    def total(self):
        return sum(self.sent.values())


def counted(folder, wanted):
    """The bytes that engines of the library report as sent, by NIC ("local": on one host), once they reach the number or time is over."""
    deadline = time.monotonic() + 10
    while True:
        sent = {}
        for path in glob.glob(str(folder / "metrics-*")):
            with open(path, encoding="utf-8") as file:
                for line in file:
                    if "sent_bytes_total" in line and 'nic="' in line:
                        nic = line.split('nic="')[1].split('"')[0]
                        sent[nic] = sent.get(nic, 0) + float(line.rsplit(" ", 1)[1])
        if sum(sent.values()) >= wanted or time.monotonic() > deadline:
            return sent
        time.sleep(0.1)


def said(run):
    """The line about UCX's settings; each process says it once."""
    lines = {line.split("info: ", 1)[1] for line in run.err.splitlines() if "as UCX: " in line}
    check_equal(len(lines), 1, f"lines about UCX's settings: {lines}")
    return lines.pop()


@case()
def default_agents_move_bytes_over_this_library():
    run = Run(scratch())
    check_equal(run.code, 0, run.err)
    check_equal(run.result["backends"], ["UCX"], "NIXL's default backends")
    check(run.total() >= MOVED, f"the library has sent {run.sent} for a write and a read of 1 MiB")
    for plugin in ("TCPX", "UCX", "UCX_REAL", "POSIX"):
        check(plugin in run.result["plugins"], f"no {plugin} among {run.result['plugins']}")
    check_equal(said(run), "as UCX: the program sets nothing of UCX", "the line")


@case()
def forked_children_have_it_too():
    run = Run(scratch(), "--fork")
    check_equal(run.code, 0, run.err)
    check(run.total() >= MOVED, f"sent: {run.sent}")


@case()
def directory_does_the_same():
    folder = scratch()
    run = Run(folder, command=["env", f"NIXL_PLUGIN_DIR={directory()}"])
    check_equal(run.code, 0, run.err)
    check(run.total() >= MOVED, f"sent: {run.sent}")


@case(NCCL_GPUDIRECTTCPX_SOCKET_IFNAME="", NCCL_SOCKET_IFNAME="")
def variables_of_ucx_are_understood():
    folder = scratch()
    wishes = {"UCX_TLS": "tcp,cuda_copy", "UCX_NET_DEVICES": "lo,mlx5_77:1", "UCX_RNDV_THRESH": "inf", "UCX_LOG_LEVEL": "error"}
    code, line, err = tool("as-ucx", "--explain", **wishes)
    check_equal(code, 0, err)
    check_equal(line, "as UCX: understood UCX_NET_DEVICES=lo,mlx5_77:1 (data NICs lo; not here: mlx5_77:1), UCX_TLS=tcp,cuda_copy (no direct transfers); "
                "ignored 2: UCX_LOG_LEVEL, UCX_RNDV_THRESH\n", "explained")
    run = Run(folder, **wishes)
    check_equal(said(run) + "\n", line, "what the program logs")
    check(run.sent.get("lo", 0) >= MOVED and "local" not in run.sent, f"sent: {run.sent}")
    # And without them, from process to process.
    run = Run(folder, NCCL_SOCKET_IFNAME="lo")
    check(run.sent.get("local", 0) >= MOVED, f"sent: {run.sent}")


@case()
def parameters_of_ucx_are_taken():
    folder = scratch()
    params = {"num_workers": "4", "num_threads": "2", "ucx_error_handling_mode": "none", "engine_config": "TLS=tcp,MAX_RMA_RAILS=4", "split_batch_size": "8",
              "device_list": "lo", "ucx_num_device_channels": "2", "num_channels": "2"}
    run = Run(folder, "--params", json.dumps(params), NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=None)
    check_equal(run.code, 0, run.err)
    check_equal(run.result["params"], {"ucx_devices": "", "num_workers": "1", "ucx_error_handling_mode": "peer"}, "the parameters of UCX")
    check_equal(said(run), "as UCX: understood device_list=lo (data NICs lo), engine_config TLS=tcp (no direct transfers); ignored 6: "
                "engine_config MAX_RMA_RAILS, num_threads, num_workers, split_batch_size, ucx_error_handling_mode, ucx_num_device_channels", "the line")
    check(run.sent.get("lo", 0) >= MOVED and "local" not in run.sent, f"sent: {run.sent}")
    check("is not known" not in run.err, run.err)


@case()
def nothing_stands_for_ucx_unasked():
    scratch()
    check(not BUILT or not os.path.exists(os.path.join(BUILT, "libplugin_UCX.so")), f"{BUILT} has a plugin UCX")
    code, out, err = tool("plugin-dir")
    check_equal(code, 0, err)
    plain, ucx = pathlib.Path(out.strip()), directory()
    real = (plain / "libplugin_UCX.so").resolve()
    check("nixl" in str(real.parent) and real == (ucx / "libplugin_UCX_REAL.so").resolve(), f"UCX is {real}")
    check(not (plain / "libplugin_UCX_REAL.so").exists(), "UCX_REAL in the directory of all plugins")
    check_equal((ucx / "libplugin_UCX.so").resolve().name, "libtcpx_as_ucx.so", "UCX where it is replaced")
    others = sorted(entry.name for entry in real.parent.glob("*.so") if entry.name != "libplugin_UCX.so")
    for name in others:
        check((ucx / name).resolve() == real.parent / name, f"{name} is not NIXL's")
    check_equal(directory(), ucx, "the directory asked again")


@case()
def ucx_itself_is_ucx_real():
    folder = scratch()
    try:
        plain = Run(folder, "--backend", "UCX", command=["env"], moved=0)
    except harness.Failure as failure:
        raise harness.Skip(f"UCX itself does not work here: {failure}") from failure
    check_equal(plain.sent, {}, "what TCPX has sent")
    real = Run(folder, "--backend", "UCX_REAL", moved=0)
    check_equal((real.result["backends"], real.sent), (["UCX_REAL"], {}), "UCX_REAL")
    check_equal(real.code, plain.code, "its exit status")
    real = Run(folder, "--backend", "UCX_REAL", "--params", '{"num_workers": "2"}', moved=0)
    check(real.result["params"].keys() >= {"num_workers", "ucx_error_handling_mode"}, f"parameters of UCX_REAL: {real.result['params']}")


@case()
def plugins_of_a_named_directory_are_taken():
    folder = scratch()
    named = folder / "named" / "plugins"
    named.mkdir(parents=True)
    (named / "libplugin_MINE.so").symlink_to((directory() / "libplugin_TCPX.so").resolve())
    run = Run(folder, NIXL_PLUGIN_DIR=str(named))
    check_equal(run.code, 0, run.err)
    check(f"NIXL_PLUGIN_DIR is {named}" in run.err, "no word about NIXL_PLUGIN_DIR")
    check_equal(sorted(run.result["plugins"]), ["MINE", "TCPX", "UCX"], "plugins")
    check(run.total() >= MOVED, f"sent: {run.sent}")
    # A directory made here is none of the user's.
    code, plain, err = tool("plugin-dir")
    check_equal(code, 0, err)
    for own in (plain.strip(), str(directory())):
        code, out, err = tool("as-ucx", "--dir", NIXL_PLUGIN_DIR=own)
        check_equal((code, out.strip(), err), (0, str(directory()), ""), f"with {own}")
    # NIXL's own, by its name, is with UCX_REAL.
    real = (directory() / "libplugin_UCX_REAL.so").resolve().parent
    run = Run(folder, NIXL_PLUGIN_DIR=str(real))
    check("UCX_REAL" in run.result["plugins"] and run.total() >= MOVED, f"{run.result['plugins']}, sent: {run.sent}")


@case()
def command_is_what_runs():
    scratch()
    check_equal(tool("as-ucx", "--", "sh", "-c", "exit 3")[0], 3, "exit status of the command")
    code, out, err = tool("as-ucx", "--", "sh", "-c", 'echo "$NIXL_PLUGIN_DIR" "$0"', "a  b")
    check_equal((code, out), (0, f"{directory()} a  b\n"), err)
    code, out, err = tool("as-ucx", "--", "no-such-program")
    check(code == 127 and "no-such-program" in err and "Traceback" not in err, f"{code} {err}")
    for wrong in ([], ["--"], ["sh"], ["--dir", "x"]):
        code, out, err = tool("as-ucx", *wrong)
        check(code == 2 and "as-ucx -- COMMAND" in err, f"{wrong}: {code} {err}")
    code, out, err = tool("as-ucx", "--", "sh", "-c", "kill -9 $$")
    check_equal(code, -signal.SIGKILL, "a command that is killed")


@case()
def compiled_programs_need_no_change():
    """The example that is in NIXL's wheels: C++, with the backend UCX and its parameters."""
    folder, package = scratch(), os.environ.get("NIXL_PACKAGE", "nixl")
    spec = importlib.util.find_spec(package)
    found = pathlib.Path(spec.origin).parent.parent / f"{package}.scripts" / "nixl_example"
    if not found.exists():
        raise harness.Skip(f"the wheel of {package} has no {found.name}")
    program = shutil.copy(found, folder)
    os.chmod(program, 0o755)
    site = found.parent.parent
    libraries = [str(path) for name in (f".{package}.mesonpy.libs", f"{package}.libs") if (path := site / name).exists()]
    libraries = os.pathsep.join([*libraries, *filter(None, [PLAIN.get("LD_LIBRARY_PATH")])])
    plain = subprocess.run([program], env=merged({"LD_LIBRARY_PATH": libraries}), capture_output=True, timeout=60, check=False)
    if plain.returncode != 0:
        raise harness.Skip(f"the example does not work with UCX itself here: it ends with {plain.returncode}")
    code, out, err = tool("as-ucx", "--", program, LD_LIBRARY_PATH=libraries)
    print(out, err)
    check_equal(code, 0, "exit status")
    check("Transfer verified" in out and "as UCX: " in err, "the example has not run over this library")


@case()
def agent_with_the_real_ucx_is_refused():
    """One program with TCPX in UCX's place, the other without: neither takes the other's metadata, and neither ends by it."""
    folder = scratch()
    package = os.environ.get("NIXL_PACKAGE", "nixl")
    agent = f"import sys, {package}._api as api; agent = api.nixl_agent(sys.argv[1]); "
    write = [sys.executable, "-c", agent + "open(sys.argv[2], 'wb').write(agent.get_agent_metadata())"]
    load = [sys.executable, "-c", agent + """
try:
    agent.add_remote_agent(open(sys.argv[2], 'rb').read())
    agent.make_connection(sys.argv[3])
except Exception as error:
    print('refused:', error, flush=True)
"""]

    def run(command, *words, ours):
        return subprocess.run([*command, *words], env=merged({"NIXL_PLUGIN_DIR": str(directory()) if ours else None}), capture_output=True, text=True,
                              timeout=60, check=False)

    for name in ("ours", "real"):
        run(write, name, str(folder / name), ours=name == "ours")
    if not (folder / "real").exists():
        raise harness.Skip("UCX itself does not work here")
    for name, other in (("ours", "real"), ("real", "ours")):
        done = run(load, name, str(folder / other), other, ours=name == "ours")
        print(name, done.returncode, done.stdout, done.stderr)
        check("refused:" in done.stdout, f"{name} ended with {done.returncode}")
        check(name == "real" or "agent 'real' has another plugin under the name of this backend" in done.stderr, "what the log says")


if __name__ == "__main__":
    harness.main(__doc__)
