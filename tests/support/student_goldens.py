"""The golden StyleGAN networks, rebuilt with their weights."""

import json

import numpy as np
import torch

from generators import stylegan2, stylegan3
from pretrained.nvidia_pickle import NetworkRecord
from repository import GOLDENS

STUDENTS = ["stylegan2-uncond-32", "stylegan2-cond10-16", "stylegan3-t-32", "stylegan3-r-32"]


def load_student(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    arguments = json.loads(str(golden["meta"]))["kwargs"]
    state = {key[6:]: torch.as_tensor(golden[key]) for key in golden if key.startswith("state/")}
    record = NetworkRecord("Generator", arguments=arguments, tensors=state)
    (family,) = (known for known in (stylegan2, stylegan3) if known.from_record(record))
    student = family.build(family.from_record(record))
    student.load_state_dict(state, strict=True)
    labels = torch.as_tensor(golden["in/c"])
    return (
        student,
        golden,
        torch.as_tensor(golden["in/z"]),
        labels.argmax(1) if labels.shape[1] else None,
    )
