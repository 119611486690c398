"""What a kernel keeps in flight to memory on an H100 or H200, beside what Little's law asks.

    bytes in flight of a multiprocessor >= bandwidth x latency / multiprocessors

No constant of a kernel is assumed; what Triton made of it is read:
    loads                SASS, as nvdisasm prints it
    registers, spills    cuobjdump --dump-resource-usage
    shared memory        Triton's metadata
    sectors              the layout of each tile in Triton's GPU IR: which bytes a warp's lanes load
    resident programs    the above and the grid, against the limits of a multiprocessor

Only loads of large tensors count. Which tensor a load reads is followed through the registers, from
the parameter in constant bank 0 of which its address was computed. A loop's body is read once.
A pipelined loop copies to shared memory (LDGSTS) in groups, each ended by LDGDEPBAR, and waits by
DEPBAR.LE SB0, n for all but the last n. These n groups count: they are in flight while the program
computes. In another program the bytes count that are outstanding (LDG) when an instruction first
reads a loaded register: the largest such number in the code.
"""

import re
from dataclasses import dataclass, field

from torch import Tensor

from predict.kernel_code import Compiled, Launch

ARCH = 90  # of H100 and H200
MULTIPROCESSORS = 132  # of both, SXM
LATENCY_S = 700e-9
"""Assumption: of a load while memory is busy, until it is measured."""
BANDWIDTHS = {"h100": 3.0e12, "h200": 4.3e12}
"""Bytes/s of a copy: the H200's measured by others, the H100's assumed."""
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
"""Of a multiprocessor; a quarter of registers and warps belongs to each of its four schedulers."""
SHARED, RESERVED_SHARED = 228 << 10, 1 << 10  # of a multiprocessor; the system's in each program
FIRST_PARAMETER = 0x210  # in constant bank 0
LARGE = 1 / 64  # of the bytes of a kernel's largest tensor
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"\b(U?R)(\d+)")
CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
LOAD = re.compile(r"LDG(STS)?\.E(?:\.[A-Z]{2,}\w*)*?(?:\.(U8|U16|64|128))?$")
WIDTHS = {"U8": 1, "U16": 2, None: 4, "64": 8, "128": 16}
NO_RESULT = ("ST", "RED", "BRA", "BAR", "DEPBAR", "LDGDEPBAR", "LDGSTS")
TILE = re.compile(
    r"(?:tt\.load|async_copy_global_to_local) .*?"
    r": tensor<(\d+)x(\d+)x!tt\.ptr<[a-z]+(\d+)>, (#\w+)>"
)
LAYOUT = re.compile(
    r"(#\w+) = .*sizePerThread = \[(\d+), (\d+)\], threadsPerWarp = \[(\d+), (\d+)\]"
    r".*order = \[(\d), \d\]"
)


@dataclass
class Loads:
    """Of a thread: bytes in flight, and the number of loads in the code by their bytes."""

    in_flight: int = 0
    copies_ahead: bool = False
    widths: dict[int, int] = field(default_factory=dict)


def loads_of(sass: str, large: dict[int, str]) -> Loads:
    """Read the code; `large` has large tensors by their offset among the parameters."""
    found = Loads()
    origin: dict[str, set[int]] = {}  # of an address: parameters that it was computed from
    written_by: dict[str, int] = {}  # register: the load that will write it
    pending: dict[int, int] = {}  # load: bytes
    groups: list[int] = [0]
    for number, (opcode, text) in enumerate(INSTRUCTION.findall(sass)):
        operands = text.split(", ")
        result = None if opcode.startswith(NO_RESULT) else REGISTER.match(operands[0])
        sources = {kind + at for kind, at in REGISTER.findall(", ".join(operands[bool(result) :]))}
        for register in sources & written_by.keys():
            if not found.copies_ahead:
                found.in_flight = max(found.in_flight, sum(pending.values()))
            pending.pop(written_by[register], None)
        parameters = {int(at, 16) - FIRST_PARAMETER for at in CONSTANT.findall(text)}
        parameters = (parameters & large.keys()).union(*(origin.get(r, set()) for r in sources))
        written = _written(result, opcode)
        for register in written:
            pending.pop(written_by.pop(register, -1), None)
            origin[register] = parameters
        if (load := LOAD.match(opcode)) and parameters:
            width = WIDTHS[load[2]]
            found.widths[width] = found.widths.get(width, 0) + 1
            if load[1]:
                groups[-1] += width
                continue
            pending[number] = width
            written_by |= dict.fromkeys(written, number)
            origin |= {register: set() for register in written}  # a value and no address
        elif opcode == "LDGDEPBAR":
            groups.append(0)
        elif opcode == "DEPBAR.LE" and sum(groups) and not found.copies_ahead:
            keep = int(operands[1], 16)  # groups[-1] is not yet ended
            found.in_flight, found.copies_ahead = sum(groups[:-1][len(groups) - 1 - keep :]), True
    return found


def num_loops(sass: str) -> int:
    """Conditional branches back. A kernel's code ends in an endless loop, which is not counted."""
    seen, loops = set(), 0
    for label, target in re.findall(r"^(\.L_\w+):|@!?U?P\w+ BRA[^;]*`\((\.L_\w+)\)", sass, re.M):
        loops += target in seen
        seen.add(label or None)
    return loops


def _written(result: re.Match | None, opcode: str) -> list[str]:
    """The registers that an instruction writes."""
    if result is None:
        return []
    is_pair = ".64" in opcode or "WIDE" in opcode or opcode.startswith("CS2R")
    count = 4 if ".128" in opcode else 2 if is_pair else 1
    return [f"{result[1]}{int(result[2]) + i}" for i in range(count)]


def large_tensors(launch: Launch) -> dict[int, str]:
    """Offset and name of the parameters that point to tensors of activations."""
    offset, found, arguments = 0, {}, launch.arguments
    largest = max(t.nbytes for t in launch.tensors)
    for name, kind in launch.signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") else 4
        offset = -(-offset // size) * size
        value = arguments[name]
        if isinstance(value, Tensor) and value.nbytes >= LARGE * largest:
            found[offset] = name
        offset += size
    return found


def resident_programs(resources: dict[str, int], num_warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    of_warp = -(-resources["registers"] * 32 // 256) * 256
    by_registers = 4 * (REGISTERS // 4 // of_warp) // num_warps
    by_shared = SHARED // (resources["shared"] + RESERVED_SHARED)
    return min(by_registers, by_shared, WARPS // num_warps, PROGRAMS)


def sectors(ttgir: str) -> tuple[int, int]:
    """Sectors of 32 bytes that a request of a warp touches, and the least for its bytes.

    Of the loads of tiles that with the most bytes a lane; rows of a tile start on a sector.
    """
    layouts = {name: list(map(int, values)) for name, *values in LAYOUT.findall(ttgir)}
    widest = (0, 0, 0)
    for *shape, bits, name in TILE.findall(ttgir):
        if name in layouts:
            axis = layouts[name][4]  # along which memory is dense
            per_lane, lanes = layouts[name][axis], layouts[name][2 + axis]
            columns, stride = int(shape[axis]), per_lane * int(bits) // 8
            widest = max(widest, (min(16, stride), stride, min(lanes, columns // per_lane)))
    width, stride, lanes = widest
    if width == 0:
        return 0, 0
    touched = {(lane * stride + byte) // 32 for lane in range(lanes) for byte in range(width)}
    return len(touched) * (32 // lanes), -(-32 * width // 32)


def in_flight(launch: Launch, compiled: Compiled) -> dict:
    """The figures of a launch on an H100 and an H200; compiled for sm_90."""
    num_warps = launch.options.get("num_warps", 4)
    loads = loads_of(compiled.sass, large_tensors(launch))
    programs = 1
    for axis in launch.grid:
        programs *= axis
    resident = min(resident_programs(compiled.resources, num_warps), programs / MULTIPROCESSORS)
    num_bytes = loads.in_flight * 32 * num_warps * resident
    touched, least = sectors(compiled.ttgir)
    return {
        "kernel": launch.label,
        "shape": list(launch.shape),
        "launches": launch.count,
        "in_flight_kib": round(num_bytes / 1024, 1),
        "copies_ahead": loads.copies_ahead,
        "load_bytes": sorted(loads.widths),
        "sectors": [touched, least],
        "resident_programs": round(resident, 2),
        "occupancy": round(resident * num_warps / WARPS, 2),
    } | {
        f"of_little_{gpu}": round(num_bytes * MULTIPROCESSORS / (bandwidth * LATENCY_S), 2)
        for gpu, bandwidth in BANDWIDTHS.items()
    }
