"""Seccomp filter against system calls that attacks start with and contest programs do not need.

Denied calls fail with EPERM, `clone3` with ENOSYS (libc then falls back to `clone`, whose flags can be inspected). A
call through another architecture's table kills the program.
"""

from __future__ import annotations

import platform
import struct

# name -> number on (x86_64, aarch64), from Linux arch/*/entry/syscalls
_DENIED = {
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    # memory outside any address space
    **{"shmget": (29, 194), "memfd_create": (319, 279), "memfd_secret": (447, 447)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "fsopen": (430, 430), "fsmount": (432, 432)},
    **{"move_mount": (429, 429), "open_tree": (428, 428), "mount_setattr": (442, 442)},
    **{"unshare": (272, 97), "setns": (308, 268)},
    **{"keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273)},
    **{"open_by_handle_at": (304, 265), "quotactl": (179, 60)},
}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, AUDIT_ARCH, clone
_SOCKET = (41, 198)
_FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink; e.g. vsock is not isolated by network namespaces

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050001, 0x00050026
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's low half


def kafel_policy() -> str:
    """Return the rules in Kafel, nsjail's language; empty on an architecture without a table."""
    if platform.machine() not in _ARCHITECTURES:
        return ""
    column, _, _ = _ARCHITECTURES[platform.machine()]
    denied = ", ".join(f"SYSCALL[{numbers[column]}]" for numbers in _DENIED.values())
    spaces = f"clone(flags) {{ (flags & {_NEW_NAMESPACES:#x}) != 0 }}"
    others = " && ".join(f"family != {family}" for family in _FAMILIES)
    sockets = f"socket(family) {{ {others} }}"
    return f"ERRNO(1) {{ {denied}, {spaces}, {sockets} }} ERRNO(38) {{ SYSCALL[{_CLONE3}] }} DEFAULT ALLOW"


def bpf_program() -> bytes:
    """Return the BPF filter, an array of struct sock_filter; empty on an architecture without a table."""
    if platform.machine() not in _ARCHITECTURES:
        return b""
    column, arch, clone = _ARCHITECTURES[platform.machine()]
    lines = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if column == 0:  # the x32 table shares the architecture
        lines += [(_ABOVE, 0, 1, 0x3FFFFFFF), (_RETURN, 0, 0, _KILL)]
    for number in (numbers[column] for numbers in _DENIED.values()):
        lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ENOSYS)]
    lines += [(_EQUAL, 0, 2 + len(_FAMILIES), _SOCKET[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    lines += [(_EQUAL, len(_FAMILIES) - number, 0, family) for number, family in enumerate(_FAMILIES)]
    lines += [(_RETURN, 0, 0, _EPERM), (_LOAD, 0, 0, _NUMBER)]
    lines += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    lines += [(_ANY_BIT, 0, 1, _NEW_NAMESPACES), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
