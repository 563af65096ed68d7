"""A process that has imported everything, and forks for each command line: a start that takes no seconds.

Reads lines of JSON, {"arguments": […], "output": file}; answers each with the child's process id. Then reads a
line more, and answers with the exit status when the child has ended, negative for a signal. Until it is asked the
child's number stays the child's, and can be killed.
"""

import json
import os
import sys

import lightning_fabric
import matplotlib.figure
import sklearn.datasets
import torch

import pyro_bmrs.reports.report
import pyro_bmrs.runs.run
from pyro_bmrs import cli


def child(arguments, output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    os._exit(cli._guarded(arguments))


if __name__ == "__main__":
    loaded = (
        lightning_fabric,
        matplotlib.figure,
        sklearn.datasets,
        pyro_bmrs.reports.report,
        pyro_bmrs.runs.run,
    )
    print(len(loaded), flush=True)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            child(**json.loads(line))
        print(process, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
