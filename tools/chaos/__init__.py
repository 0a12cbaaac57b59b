"""Kills training programs, and checks the files they leave and how they resume."""

import os

# The programs inherit these. One thread, since the order of sums depends on their number.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
for _name in ("OMP_NUM_THREADS", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS"):
    os.environ[_name] = "1"
