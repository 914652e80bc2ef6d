"""Progress of long work: a bar on a terminal, elsewhere (a log file) a line every ten seconds.

    with progress.activity("mae-toy: knn"):              # shown while no bar is open
        for item in progress.bar(items, "mae-toy: encoding", total=100, unit="img"):
            ...

A line of the innermost activity or bar is also printed while a single step takes longer.
"""
import contextlib
import sys
import threading
import time

from tqdm import tqdm

INTERVAL = 10.0          # seconds between two lines
running = []             # open activities and bars, the innermost last
printer = None           # the thread that prints them, once it is needed


class Lines:
    """What `tqdm` does on a terminal, as lines. Also an activity, which has no steps."""

    def __init__(self, items=None, desc="", total=None, unit="it", initial=0):
        self.items, self.desc, self.total, self.unit, self.n = items, desc, total, unit, initial
        self.first, self.begin, self.postfix = initial, time.monotonic(), ""
        running.append(self)
        start_printer()

    def __iter__(self):
        try:
            for item in self.items:
                yield item
                self.update()
        finally:                                         # also after an exception or a break
            self.close()

    def update(self, n=1):
        self.n += n

    def set_postfix(self, **values):
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def close(self):
        if self in running:
            running.remove(self)

    def line(self):
        seconds, done = time.monotonic() - self.begin, self.n - self.first
        text = f"{self.desc}: "
        if self.n or self.total:
            text += f"{self.n:,}{f' of {self.total:,}' if self.total else ''} {self.unit}, "
        text += f"after {tqdm.format_interval(seconds)}"
        if self.total and done:
            left = seconds / done * max(0, self.total - self.n)
            text += f", {tqdm.format_interval(left)} left"
        return text + self.postfix


def start_printer():
    """Starts the thread, once."""
    global printer
    if printer is None:
        printer = threading.Thread(target=print_lines, daemon=True)
        printer.start()


def print_lines():
    while True:
        time.sleep(INTERVAL)
        for innermost in running[-1:]:
            print(innermost.line(), file=sys.stderr, flush=True)


def bar(items=None, desc="", total=None, unit="it", initial=0, shown=True):
    """Wraps an iterable, or is updated by hand, as tqdm. shown: False in all processes but one."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if shown and not sys.stderr.isatty():
        return Lines(items, desc, total, unit, initial)
    return tqdm(items, desc=desc, total=total, unit=unit, initial=initial, delay=5, leave=False,
                dynamic_ncols=True, disable=not shown)


@contextlib.contextmanager
def activity(text, shown=True):
    """Names what is done inside. It has no bar on a terminal."""
    level = len(running)
    if shown and not sys.stderr.isatty():
        Lines(desc=text)
    try:
        yield
    finally:
        del running[level:]                              # also bars that an exception left open
