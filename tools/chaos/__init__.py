"""Kills programs that train and export, and checks what they leave and how they go on."""

import os

# For the programs too, which inherit them. One thread: several may add up in another order.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
for _name in ("OMP_NUM_THREADS", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS"):
    os.environ[_name] = "1"
