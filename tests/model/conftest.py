"""Models this small are faster on one thread, and two test processes don't wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
