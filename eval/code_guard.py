"""Runs a program that a model wrote, in a process of its own; nothing imports this.

It is started as `python -I -S code_guard.py`, reads a request from its standard input
and writes what became of the program to the file descriptor that the request names. It
forks twice: the first process keeps the time and removes what is left; the second one
is the first of a space of process numbers, where there is such, and waits; the third
one limits itself and runs the program.

This guards against accidents (loops, floods of memory, files or processes, programs
that leave early), not against somebody who means to break out.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time

NEW_USER, NEW_NET, NEW_PID = 0x10000000, 0x40000000, 0x20000000
DEATH_SIGNAL, CHILD_SUBREAPER = 1, 36
MOST = 300
"""Characters of what is said about a failure."""


class Refused(PermissionError):
    """What a guarded program may not do."""


def main():
    """Read the request, run the program, clear up."""
    request = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    call = _libc()
    call("prctl", CHILD_SUBREAPER, 1, 0, 0, 0)
    _apart(call)
    first = os.fork()
    if not first:
        call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        worker = os.fork()
        if worker:  # signals do not end the first process: it runs no program
            os._exit(_ended(os.waitpid(worker, 0)[1]))
        call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        _work(request)
    said, left = _wait(first, request["seconds"])
    _clear(left)
    if said:
        _say(request, said)
    os._exit(0)


def _libc():
    """Calls of the C library; -1 where the system does not have one."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except OSError:
        return lambda *_: -1

    def call(name, *arguments):
        found = getattr(library, name, None)
        return -1 if found is None else found(*arguments)

    return call


def _apart(call):
    """Without a network and with process numbers of its own, where the kernel allows.

    What is forked from here on is killed with the first of these processes.
    """
    user, group = os.getuid(), os.getgid()
    if call("unshare", NEW_USER | NEW_NET | NEW_PID):
        return
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1"}
    maps["gid_map"] = f"{group} {group} 1"
    for name, text in maps.items():
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError:  # files cannot be made then; most programs make none
            pass


def _ended(status):
    """The signal that ended a process, or 0."""
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _wait(first, seconds):
    """What ended the program, where it could not say it itself, and who is left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(first, os.WNOHANG)
        if done:
            number = _ended(status)
            return f"signal {number}" if number else "", set()
        time.sleep(0.004)
    return "time", {first}


def _clear(left):
    """Kill the processes and whatever they left running, which is ours by now."""
    for _ in range(200):
        for number in {*left, *_children()}:
            try:
                os.kill(number, signal.SIGKILL)
            except OSError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        left = set()
        time.sleep(0.004)  # those of the killed become ours


def _children():
    try:
        with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
            return [int(one) for one in file.read().split()]
    except OSError:
        return []


def _say(request, text):
    try:
        os.write(request["result"], f"{text[:MOST]}\n".encode(errors="replace"))
    except OSError:
        pass


def _work(request):
    """Limit this process, run the program, say what became of it; never returns."""
    program, token = request.pop("program"), request.pop("token")
    said = "exit"
    try:
        code = compile(program, "<reply>", "exec")
        _limit(request)
        _refuse(os.path.realpath(os.getcwd()))
        exec(code, {"__name__": "reply"})
        said = f"passed {token}"
    except AssertionError:
        said = "assertion"
    except SyntaxError as wrong:
        said = f"syntax: {wrong}"
    except MemoryError:
        said = "memory"
    except SystemExit:
        said = "exit"
    except BaseException as wrong:  # whatever a program raises
        said = _named(wrong)
    _say(request, said)
    os._exit(0)


def _named(wrong):
    kind = "refused" if isinstance(wrong, Refused) else f"error: {type(wrong).__name__}"
    try:
        return f"{kind}: {str(wrong)[:200]}".replace("\n", " ")
    except BaseException:  # of a `__str__` that a program wrote
        return kind


def _limit(request):
    memory, size = request["memory"], request["file_size"]
    limits = {
        "RLIMIT_AS": memory,
        "RLIMIT_DATA": memory,
        "RLIMIT_FSIZE": size,
        "RLIMIT_CPU": int(request["seconds"]) + 1,  # of its threads together
        "RLIMIT_NPROC": 64,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    for name, most in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):  # macOS knows limits that it does not take
            pass


OTHERS = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "pty.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.startfile",
    "os.kill",
    "os.setuid",
    "os.unshare",
    "resource.setrlimit",
    "resource.prlimit",
    "signal.pthread_kill",
    "sys.addaudithook",
)
"""Events that are refused: other processes, networks, the C library."""
PLACES = {
    "open": 1,
    "os.chdir": 1,
    "os.chflags": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
    "os.setxattr": 1,
    "os.removexattr": 1,
    "shutil.rmtree": 1,
    "shutil.move": 2,
    "sqlite3.connect": 1,
}
"""Events that change files, and how many of their arguments are paths."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse(folder):
    """From here on, what reaches out of the folder raises."""
    import _posixsubprocess

    def no(*_, **__):
        raise Refused("no processes")

    _posixsubprocess.fork_exec = no  # raises no event of its own
    real, fsdecode, beginning = os.path.realpath, os.fsdecode, folder + os.sep

    def inside(path):
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor, of something that is open
        place = real(fsdecode(path))
        return place == folder or place.startswith(beginning) or place == os.devnull

    def hook(event, arguments):
        if event.startswith(OTHERS):
            raise Refused(f"{event} is not allowed")
        count = PLACES.get(event)
        if not count or event == "open" and not (arguments[2] or 0) & WRITES:
            return
        for path in arguments[:count]:
            if not inside(path):
                raise Refused(f"{event} outside of the folder")

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
