"""Progress of long work: a bar on a terminal, elsewhere (a log file) a line after ten seconds in
which the program has printed nothing.

    with progress.activity("mae-toy: knn"):              # work without steps
        for item in progress.bar(items, "mae-toy: encoding", total=100, unit="img"):
            ...

Both are alive while a single step takes longer. Nothing is shown in the first seconds, so that
quick work leaves no trace.
"""
import contextlib
import sys
import threading
import time

from tqdm import tqdm

INTERVAL = 10.0          # seconds between two lines
DELAY = 5.0              # seconds before a bar is shown on a terminal
running = []             # open activities and bars, the innermost last
printer = None           # the thread that prints them, once it is needed
last_line = 0.0          # when the program printed its last line


def forget(closed):
    """Removes a bar or an activity from those that are shown."""
    running[:] = [bar for bar in running if bar is not closed]       # tqdm's == compares positions


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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, n=1):
        self.n += n

    def set_postfix(self, **values):
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def close(self):
        forget(self)

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


class Bar(tqdm):
    """tqdm's bar, hidden for the first seconds and then redrawn every second."""

    def __init__(self, *args, **kwargs):
        self.begin = time.monotonic()
        super().__init__(*args, file=sys.stderr, leave=False, dynamic_ncols=True, **kwargs)
        running.append(self)
        start_printer()

    def display(self, *args, **kwargs):
        return time.monotonic() - self.begin >= DELAY and super().display(*args, **kwargs)

    def close(self):
        with self.get_lock():                            # not while the thread draws it
            forget(self)
            super().close()


def start_printer():
    """Starts the thread, once."""
    global printer
    if printer is None:
        printer = threading.Thread(target=print_all, daemon=True)
        printer.start()


def print_all():
    while True:
        time.sleep(1)
        draw_bars()
        print_line_if_due()


def draw_bars():
    with tqdm.get_lock():                                # a bar is not closed meanwhile
        for bar in list(running):
            if isinstance(bar, Bar):
                bar.refresh(nolock=True)


def print_line_if_due():
    """Prints the state of the innermost work, if nothing was printed during the last ten seconds of
    the outermost one."""
    lines = [bar for bar in list(running) if isinstance(bar, Lines)]
    if lines and time.monotonic() - max(last_line, lines[0].begin) >= INTERVAL:
        write(lines[-1].line())


def write(text, file=None):
    """Prints a line, by default on stderr, without damage to the bars."""
    global last_line
    last_line = time.monotonic()
    file = file or sys.stderr
    tqdm.write(text, file=file)
    file.flush()


def bar(items=None, desc="", total=None, unit="it", initial=0, shown=True):
    """Wraps an iterable, or is updated by hand, as tqdm. shown: False in all processes but one."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if not shown:
        return tqdm(items, disable=True)
    kind = Bar if sys.stderr.isatty() else Lines
    return kind(items, desc=desc, total=total, unit=unit, initial=initial)


@contextlib.contextmanager
def activity(text, shown=True):
    """Names what is done inside, and shows for how long."""
    level = len(running)
    if shown and sys.stderr.isatty():
        Bar(desc=text, bar_format="{desc}: {elapsed}")
    elif shown:
        Lines(desc=text)
    try:
        yield
    finally:
        for opened in running[level:][::-1]:             # also bars that an exception left open
            opened.close()
