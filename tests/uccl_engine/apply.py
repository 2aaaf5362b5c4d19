"""Puts the lines of docs/uccl-engine.md into a copy of UCCL's engine, where the text says. Every line of code comes from that page, so a page
that is wrong fails here or in the compiler. Knows where the page's places are in the engine, and nothing of what the lines do.

    apply.py DOC MAKEFILE_DOC P2P_DIRECTORY
"""

import re
import sys
from pathlib import Path


class Page:
    """The page's blocks of code."""

    def __init__(self, path):
        self.blocks = [re.sub(r"(?m)^  " if found[1] else r"(?!)", "", found[2])
                       for found in re.finditer(r"(?ms)^( *)```cpp\n(.*?)^ *```$", path.read_text(encoding="utf-8"))]
        self.used = set()

    def block(self, words):
        """The one block that contains these words."""
        found = [number for number, block in enumerate(self.blocks) if words in block]
        if len(found) != 1:
            sys.exit(f"{len(found)} blocks of the page have '{words}'")
        self.used.add(found[0])
        return self.blocks[found[0]]

    def unused(self):
        return [block for number, block in enumerate(self.blocks) if number not in self.used]


class File:
    def __init__(self, directory, name):
        self.path = directory / name
        self.text = self.path.read_text(encoding="utf-8")

    def put(self, anchor, code, where="after", count=1):
        """Puts code before, after or in the place of a pattern that the file has `count` times."""
        found = list(re.finditer(anchor, self.text, re.S | re.M))
        if len(found) != count:
            sys.exit(f"{self.path.name}: {len(found)} places, not {count}, look like {anchor}")
        for match in reversed(found):
            begin, end = {"before": (match.start(),) * 2, "after": (match.end(),) * 2, "instead": match.span()}[where]
            self.text = self.text[:begin] + (match.expand(code) if where == "instead" else code) + self.text[end:]

    def write(self):
        self.path.write_text(self.text, encoding="utf-8")


def literally(text):
    """A literal replacement."""
    return text.replace("\\", r"\\")


def between(block, begin, end):
    return block[block.index(begin):block.index(end)]


def transport_type(page, root):
    file, block = File(root, "util/transport_type.h"), page.block("enum class TransportType")
    enum, choice, helper = block.splitlines()[0], block.splitlines()[2], block.splitlines()[4]
    file.put(r"^enum class TransportType [^\n]*$", enum, "instead")
    file.put(r'^    if \(std::strcmp\(env, "nccl"\)', f"    {choice}\n", "before")
    file.text += f"\n{helper}\n"
    file.write()


def engine_header(page, root):
    file, block = File(root, "engine.h"), page.block("struct TcpxTraits")
    file.put(r"^// Runtime-polymorphic endpoint\.\nusing GenericEndpoint =.*?;\n", "", "instead")
    file.put(r"^struct UcclRequest \{.*?^\};\n", "\n" + block[:block.index("struct P2PMhandle")])
    for name in ("P2PMhandle", "TransferStatus"):
        member = re.search(rf"struct {name} {{\n.*?\n(.*?)\n}};", block, re.S)[1]
        file.put(rf"^struct {name} \{{.*?(?=^\}};)", member + "\n")
    file.write()


def wrapper(page, root):
    file, block = File(root, "endpoint_wrapper.h"), page.block("inline void uccl_disconnect")
    lines = block[:block.index("\n}\n")].splitlines()
    branch = lines[0].removeprefix("} ")
    for line in lines[1:]:
        statement, function = re.fullmatch(r"(.*?) *// (\w+)", line).groups()
        anchor = rf"^inline \w+ {function}\(.*?(?=else \{{\n[^}}]*(?:\}}|remote_mem_info))"
        file.put(anchor, f"{branch}\n{statement}\n}} ")
    file.text += "\n" + block[block.index("inline void uccl_disconnect"):]
    file.write()


def engine(page, root):
    file = File(root, "engine.cc")
    first = page.block("std::make_shared<TcpxEndpoint>(local_gpu_idx_, 0)")
    for cxi, block in ((r"CxiEndpoint>\(local_gpu_idx_, 0\);\n    numa_node_ = get_numa_node_from_iface\(\);\n  ", first),
                       (r"CxiEndpoint>\(INVALID_GPU, 0\);\n  ", first.splitlines()[0] + "\n  ep_ = std::make_shared<TcpxEndpoint>(-1, 0);\n")):
        file.put(cxi, block.rstrip("\n") + "\n  ")
    file.put(r"!is_nccl_transport\(\) && !is_cxi_transport\(\)", r"\g<0> && !is_tcpx_transport()", "instead")
    file.put(r"(?<=else if \()is_cxi_transport\(\)(?=\) \{\n    numa_node_ = )", r"\g<0> || is_tcpx_transport()", "instead")
    file.put(r"(?<=if \()is_cxi_transport\(\)(?=\) return rc == )", r"\g<0> || is_tcpx_transport()", "instead")
    file.put(r"is_cxi_transport\(\)(?= && rc < 0)", r"(\g<0> || is_tcpx_transport())", "instead", 6)
    connect = page.block("uccl_conn_id.peer_id == UINT64_MAX")
    file.put(r"^bool Endpoint::connect\(.*?uccl_conn_id_future\.get\(\);\n", connect)
    file.put(r"^  delete conn;\n  conn_id_to_conn_\.erase\(it\);", page.block("uccl_disconnect(ep_, conn->uccl_conn_id_.peer_id)"), "before")
    notify = page.block("->send_notification(peer_id, notification)")
    file.put(r"^int Endpoint::send_notification\(.*?(?=^  return -1;\n\})", notify)
    proxies(page, file)
    file.put(r"^bool Endpoint::poll_async\(.*?^\}\n", literally(page.block("bool Endpoint::poll_async")), "instead")
    file.write()


def proxies(page, file):
    """The error path of the two threads, and their idle path."""
    block = page.block("switch (task->type)")
    before, after = block[:block.index("  switch (task->type)")], block[block.index("} catch"):]
    place = r"^(      switch \(task->type\) \{.*?^      \}\n)      auto\* status = task->status_ptr;\n.*?memory_order_release\);\n"
    file.put(place, literally(before) + r"\1" + literally(after), "instead", 2)
    for name in ("send", "recv"):
        span = re.search(rf"^void Endpoint::{name}_proxy_thread_func\(\) \{{.*?^\}}\n", file.text, re.S | re.M)
        body = re.sub(r"(?m)^( +)((?:write|read)v?\()", r"\1ok = \2", span[0])
        file.text = file.text[:span.start()] + body + file.text[span.end():]
    file.put(r"^      send_proxy_adaptive_sleeper_\.update_timer\(\);\n    \}", " " + page.block("else {\n  uccl_idle(ep_);"))
    file.put(r"^    while \(jring_sc_dequeue_bulk\(ipc_inflight_ring_.*?^    \}\n", page.block("if (active_ops.empty()) uccl_idle"))


def c_api(page, root):
    file = File(root, "uccl_engine.cc")
    file.put(r"!is_nccl_transport\(\)", r"\g<0> && !is_tcpx_transport()", "instead", 4)
    file.put(r"(?<=if \()is_nccl_transport\(\)", r"\g<0> || is_tcpx_transport()", "instead", 3)
    file.put(r"^void uccl_engine_conn_destroy\(.*?(?=^ *delete conn;)", page.block("remove_remote_endpoint(conn->conn_id)"))
    file.write()


def makefile(path, root):
    lines = re.search(r"(?ms)^```make\n(UCCL_TCPX .*?)^```$", path.read_text(encoding="utf-8"))[1]
    file = File(root, "Makefile")
    file.put(r"^# -+ DietGPU -+$", lines + "\n", "before")
    file.write()


def main():
    page, root = Page(Path(sys.argv[1])), Path(sys.argv[3])
    makefile(Path(sys.argv[2]), root)
    for part in (transport_type, engine_header, wrapper, engine, c_api):
        part(page, root)
    if page.unused():
        sys.exit("not applied:\n" + "\n".join(page.unused()))


if __name__ == "__main__":
    main()
