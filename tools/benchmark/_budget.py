"""Cases run one after another in a worker process, within a limit of time."""

import multiprocessing
import time


def run_within(seconds, function, cases):
    """Runs `function(case)` for as many cases as fit, in a process that may die.

    A case that the longest one so far would not fit into what is left is skipped. One that is not
    done at the end is stopped. One that takes its process with it, as the system ends those that
    want too much memory, costs only its own result: the next case gets a new process.

    Args:
        seconds: Limit of the whole, with the starts of processes.
        function: A function of a module, of one argument.
        cases: What it is called with. Arguments and results are pickled.

    Yields:
        For every case, in order, its result and `None`, or `None` and the reason there is none.
    """
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    worker = None
    longest = 0.0
    try:
        for case in cases:
            begin = time.monotonic()
            left = start + seconds - begin
            if left <= longest:
                shown = max(0.0, left)
                yield None, f"skipped: {shown:.0f} s left, {longest:.0f} s may be needed"
                continue
            worker = worker or _Worker(context, function)
            try:
                outcome = worker.result(case, left)
            except TimeoutError:
                outcome = None, f"stopped: not done after {left:.0f} s, when time was up"
                worker.end()
                worker = None
            except (EOFError, ConnectionError):
                worker.process.join()
                outcome = None, f"the process ended with status {worker.process.exitcode}"
                worker = None
            longest = max(longest, time.monotonic() - begin)
            yield outcome
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A process that calls a function, case by case."""

    def __init__(self, context, function):
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(function, other), daemon=True)
        self.process.start()
        other.close()

    def result(self, case, seconds):
        self.pipe.send(case)
        if not self.pipe.poll(seconds):
            raise TimeoutError
        return self.pipe.recv()

    def end(self):
        self.process.kill()
        self.process.join()


def _work(function, pipe):
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            outcome = function(case), None
        except Exception as error:
            # One case must not take the results of others with it.
            outcome = None, f"{type(error).__name__}: {str(error)[:300]}"
        pipe.send(outcome)
