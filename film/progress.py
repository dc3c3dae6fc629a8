"""How far the main job is: windows done and to come, seconds a window, the time to go.

in   steps of the sampler, done and to come, a step of each window counted
out  a line on stderr where that is a terminal, and nothing elsewhere

    windows 12/527 |▏          | 4.31s/window, 37:00 to go
"""

from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def show_progress(steps: int, **options):
    """-> on_step(done, total) for `sample.generate_many`, whose windows take so many steps each.

    options: of tqdm.
    """
    # until the first step frames are read, of a long film for minutes
    form = "{desc} |{bar}| {rate_inv_fmt}, {remaining} to go"
    options = {"leave": False, "disable": None, "desc": "reading"} | options
    with tqdm(unit="window", bar_format=form, **options) as bar:

        def on_step(done, total):
            # parts of windows count, so that the first one says something before it is done
            windows = total // steps
            bar.total = windows
            bar.set_description_str(f"windows {done // steps}/{windows}", refresh=False)
            bar.update(done / steps - bar.n)

        yield on_step


class Progress:
    """Steps of the sampler that are done and known to come, a step of each window counted.

    Those of windows that are drawn again (film/tries.py) do not count.
    """

    def __init__(self, on_step):
        self.on_step = on_step
        self.done = 0
        self.total = 0

    def step(self, windows, *_):
        """The callback of a sampler that works on so many windows at once."""
        self.done += windows
        if self.on_step:
            self.on_step(self.done, self.total)
