import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from writesae.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def touch(megabytes=64):
    place = libc.malloc(megabytes << 20)
    ctypes.memset(place, 1, megabytes << 20)
    libc.free(place)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_not_faulted_in_again():
    def faults(how):
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout
        )

    assert faults("as it is") > 1000  # 16,384 pages of 4 KiB an allocation, or 32 of 2 MiB
    assert faults("keep") < 100
