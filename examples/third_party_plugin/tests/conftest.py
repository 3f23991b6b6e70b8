from __future__ import annotations

import torch

torch.set_num_threads(1)  # tiny models: more threads would only wait for each other
