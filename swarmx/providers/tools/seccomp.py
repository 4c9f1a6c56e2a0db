"""A filter of system calls for sandboxes: what no tool needs and where kernels were broken out of is refused."""

from __future__ import annotations

import platform
import struct

# Classic BPF (linux/bpf_common.h) over struct seccomp_data: the number of the call at 0, the architecture at 4.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050000 | 1
_X32 = 0x40000000  # a second numbering of x86-64's calls

# By name, the numbers of x86-64 and of arm64 (asm/unistd.h).
_REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "acct": (163, 89),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def program(machine: str = "") -> bytes:
    """The filter as bubblewrap takes it, or nothing for a machine whose numbers are not known here.

    Refused calls fail with EPERM; those of another architecture end the process.
    """
    known = _MACHINES.get(machine or platform.machine())
    if known is None:
        return b""
    architecture, column = known
    filters = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    if column == 0:
        filters += [_step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _EPERM)]
    for numbers in _REFUSED.values():
        filters += [_step(_EQUAL, numbers[column], 0, 1), _step(_RETURN, _EPERM)]
    return b"".join([*filters, _step(_RETURN, _ALLOW)])


def _step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter; the jumps skip so many of the next."""
    return struct.pack("=HBBI", code, if_true, if_false, operand)
