"""Storage that fails or is slow, by a library that is loaded before the C library. Modes and counts come from the environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
/* SHIM_MODE: short (every write to a file takes part of it), eio (the N-th fails), fsync (the N-th fails), eintr,
   slow (every write to a file takes N milliseconds longer). N: SHIM_AT. Several threads call. */
static int calls, syncs;
static int mode(const char *name) { const char *m = getenv("SHIM_MODE"); return m && !strcmp(m, name); }
static int at(void) { const char *n = getenv("SHIM_AT"); return n ? atoi(n) : 1; }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    int mine = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (mode("eio") && mine == at()) { errno = EIO; return -1; }
    if (mode("eintr") && mine % 2) { errno = EINTR; return -1; }
    if (mode("slow")) usleep(1000 * at());
    if (mode("short") && size > 8192) size = 8192;
    return real(fd, data, size, offset);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }
int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    int mine = __atomic_add_fetch(&syncs, 1, __ATOMIC_SEQ_CST);
    if (mode("fsync") && mine == at()) { errno = EIO; return -1; }
    return real(fd);
}
"""


def build_shim(folder: Path) -> Path:
    """The library, for LD_PRELOAD; the test is skipped where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "shim.so"), str(folder / "shim.c"), "-ldl"], check=True)
    return folder / "shim.so"
