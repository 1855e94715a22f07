"""The limits beside the figures: what the parts of a request cost alone."""

from __future__ import annotations

import multiprocessing
import os
import time

import bcrypt

from bench.client import PASSWORD
from bench.subjects import COST


def hash_for(seconds: float) -> float:
    salt, done, began = bcrypt.gensalt(COST), 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        bcrypt.hashpw(PASSWORD.encode(), salt)
        done += 1
    return done / took


def raw_bcrypt(seconds: float) -> float:
    """Return hashes per second on all cores, while nothing else runs."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.map(hash_for, [seconds] * cores, chunksize=1))
