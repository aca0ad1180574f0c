"The `os` module with one call that goes wrong: lets a test try every point of failure."

import errno
import os


class FaultyOS:
    "The `os` module, except that the `at`-th changing call dies, fails or writes only half"

    CHANGING = set("open write fsync replace rename link unlink mkdir rmdir truncate".split())

    def __init__(self, at, fault):
        self.at, self.fault, self.count, self.calls = at, fault, 0, []

    def __getattr__(self, name):
        real = getattr(os, name)
        return self._wrap(name, real) if name in self.CHANGING else real

    def _wrap(self, name, real):
        def call(*args, **kwargs):
            self.count += 1
            self.calls.append(name)
            if self.count == self.at:
                return self.fault(name, real, args)
            return real(*args, **kwargs)

        return call


def fails_with(code):
    def fault(name, real, args):
        raise OSError(code, os.strerror(code))

    return fault


def half_then_fails(name, real, args):
    if name == "write":
        real(args[0], bytes(args[1])[: len(args[1]) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_then_dies(name, real, args):
    "What kill -9 leaves: the call was never made, or a write half made, and nothing after it"
    if name == "write":
        real(args[0], bytes(args[1])[: len(args[1]) // 2])
    os._exit(9)
